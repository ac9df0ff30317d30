"""The arithmetic as a choice: what auto comes to, that it reaches the products and nothing else, and that it is bound.

Processors and GPUs are faked, so that the outcome is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.commands import ask, deactivate, evaluate, importance
from palimpsest.config import dump_config, parse_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.evaluation.answers import text_answerer
from palimpsest.evaluation.perplexity import perplexity
from palimpsest.evaluation.spoken import recording_answerer, speech_answerer
from palimpsest.files import UserError, hash_value, read_json, write_json
from palimpsest.importance import deactivate as deactivation
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.importance.select import select
from palimpsest.models import compute
from palimpsest.models.compute import Choice, choose_compute, computing, many_forwards
from palimpsest.models.loss import supervised_losses
from palimpsest.planning.plan import Assumptions, make_plan
from palimpsest.progress import Reporter
from palimpsest.rundir import Step
from palimpsest.study.run import steps_of
from palimpsest.study.workspace import Workspace
from palimpsest.training.methods import Method
from palimpsest.training.train import Settings, train
from spoken import spoken
from test_importance_estimate import make_batches
from tiny import save_tiny_models, tiny_llama, tiny_speech_lm, tiny_tokenizer

FASTEST = compute.fastest  # what tests have in its place: conftest.py
BF16 = torch.bfloat16
EXACT = "auto keeps importance, deactivation and drift in float32"  # the reason
REDUCTIONS = ("signed_sum", "per_batch_abs", "per_sequence_abs", "fisher")


@pytest.fixture
def asks_the_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(compute, "fastest", FASTEST)
    return monkeypatch


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which auto is bfloat16."""
    monkeypatch.setattr(compute, "fastest", lambda device: Choice("bfloat16", "this machine is fast"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


@contextmanager
def products(module: nn.Module) -> Iterator[dict[str, set[torch.dtype]]]:
    """The dtypes of what the linear layers and convolutions below `module` give, by layer."""
    seen: dict[str, set[torch.dtype]] = {}
    handles = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: seen.setdefault(name, set()).add(output.dtype))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def only(seen: Mapping[str, set[torch.dtype]], dtype: torch.dtype) -> bool:
    return len(seen) > 0 and all(found == {dtype} for found in seen.values())


# -- the choice -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("features", "dtype", "said"),
    [
        ({"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, "bfloat16", "(AMX)"),
        ({"amx_tile": True}, "bfloat16", "(AMX)"),
        ({"amx_tile": False, "avx512_bf16": True}, "bfloat16", "(AVX512-BF16)"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16", "(ARM's bf16)"),
        ({"avx512_f": True, "avx2": True, "avx512_bf16": False}, "float32", "has no instructions"),
        ({"architecture": "aarch64", "neon": True}, "float32", "has no instructions"),
        ({}, "float32", "has no instructions"),
    ],
)
def test_auto_asks_the_processor(
    asks_the_device: pytest.MonkeyPatch, features: dict[str, Any], dtype: str, said: str
) -> None:
    asks_the_device.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    choice = choose_compute("auto", "cpu")
    assert choice.dtype == dtype
    assert said in choice.reason


@pytest.mark.parametrize("amx", [True, False])
def test_a_torch_without_the_table_of_capabilities_is_asked_by_name(
    asks_the_device: pytest.MonkeyPatch, amx: bool
) -> None:
    asks_the_device.delattr(torch.cpu, "get_capabilities", raising=False)
    asks_the_device.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    asks_the_device.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    asks_the_device.setattr(compute, "_system_names", lambda feature: False)
    assert choose_compute("auto", "cpu").dtype == ("bfloat16" if amx else "float32")
    asks_the_device.setattr(compute, "_system_names", lambda feature: feature == "bf16")
    assert choose_compute("auto", "cpu").dtype == "bfloat16"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_asks_the_gpu(asks_the_device: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str) -> None:
    asks_the_device.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asks_the_device.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    choice = choose_compute("auto", "cuda:1")
    assert choice.dtype == dtype
    assert "GPU 1, compute capability" in choice.reason


def test_auto_is_float32_where_nothing_is_known_and_for_what_must_be_exact(
    asks_the_device: pytest.MonkeyPatch, fast: None
) -> None:
    assert choose_compute("auto", "cpu").dtype == "bfloat16"
    assert choose_compute("auto", "cpu", exact=True) == Choice(
        "float32", "auto keeps importance, deactivation and drift in float32"
    )
    assert choose_compute("bfloat16", "cpu", exact=True) == Choice("bfloat16", "asked for")
    assert choose_compute("float32", "cpu") == Choice("float32", "asked for")
    assert FASTEST("mps").dtype == "float32"


def test_weights_of_16_bits_compute_as_what_they_are() -> None:
    for weights in ("bfloat16", "float16"):
        assert choose_compute("auto", "cpu", weights=weights, exact=True).dtype == weights
        with pytest.raises(UserError, match=rf"^Weights in {weights} cannot compute in float32; .*\.$"):
            choose_compute("float32", "cpu", weights=weights)
    with pytest.raises(UserError, match=r"^There is no arithmetic 'half'; choose auto, float32 or bfloat16\.$"):
        choose_compute("half", "cpu")  # type: ignore[arg-type]


# -- it reaches the products, and nothing else ------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_losses_are_float32_in_either(name: Any) -> None:
    model, batch = tiny_llama(), make_batches(1)[0]
    with products(model) as seen, computing(name, "cpu"):
        losses, _ = supervised_losses(model, batch)
    assert losses.dtype == torch.float32
    assert only(seen, getattr(torch, name))
    assert not torch.is_autocast_enabled("cpu")
    exact, _ = supervised_losses(model, batch)
    assert torch.equal(losses, exact) == (name == "float32")
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)


def test_perplexity_and_the_records_of_deactivation() -> None:
    model, items = tiny_llama(), make_batches(2)
    with products(model) as seen:
        rounded = perplexity(model, items, compute="bfloat16")
    assert only(seen, BF16)
    exact = perplexity(model, items)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.01)


def test_answers_from_text_and_speech_and_the_encoder(setup: tuple[list[Example], Collator]) -> None:
    examples, collator = setup
    model, processor = tiny_speech_lm()
    with products(model.language_model) as seen:
        text_answerer(model.language_model, tiny_tokenizer(), 3, compute="bfloat16")(examples[:3], "text")
    assert only(seen, BF16)
    with products(model.language_model) as seen:
        speech_answerer(model, collator, 3, "bfloat16")(examples[:3], "speech")
    assert only(seen, BF16)
    with products(model) as seen:
        recording_answerer(model, processor, 3, "bfloat16")(examples[:3], "speech")
    assert only(seen, BF16)
    assert any(name.startswith("encoder") for name in seen)
    with products(model) as seen:
        recording_answerer(model, processor, 3)(examples[:3], "speech")
    assert only(seen, torch.float32)


def test_many_forwards_are_autocast_with_weights_that_are_rounded_once() -> None:
    for model in (tiny_llama(), tiny_speech_lm()[0]):
        ids = make_batches(1)[0]["input_ids"]
        before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
        with torch.no_grad(), computing("bfloat16", "cpu"):
            expected = model(input_ids=ids).logits
        language_model = getattr(model, "language_model", model)
        with torch.no_grad(), many_forwards(model, "bfloat16"):
            found = model(input_ids=ids).logits
            assert language_model.lm_head.weight.dtype == BF16
            assert language_model.get_input_embeddings().weight.dtype == torch.float32  # also where the head is tied
        assert torch.equal(found, expected)
        with pytest.raises(RuntimeError, match="stop"), many_forwards(model, "bfloat16"):
            raise RuntimeError("stop")
        with many_forwards(model, "float32"):
            assert language_model.lm_head.weight.dtype == torch.float32
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())


def test_recordings_and_cached_frames_are_encoded_alike(setup: tuple[list[Example], Collator], tmp_path: Path) -> None:
    examples, collator = setup
    model, processor = tiny_speech_lm()
    compute_features(model.encoder, processor, examples, tmp_path / "features", compute="bfloat16", batch_size=3)
    cached = Collator(collator.processor, "speech", Features(tmp_path / "features"))
    by_frames = speech_answerer(model, cached, 3, "bfloat16")(examples[:3], "speech")
    by_recording = recording_answerer(model, processor, 3, "bfloat16")(examples[:3], "speech")
    assert [a.response for a in by_frames] == [a.response for a in by_recording]


def test_frames_of_one_arithmetic_are_never_taken_for_those_of_another(
    setup: tuple[list[Example], Collator], tmp_path: Path
) -> None:
    examples = setup[0][:2]
    model, processor = tiny_speech_lm()
    shared = tmp_path / "cache"
    compute_features(model.encoder, processor, examples, tmp_path / "exact", cache=shared)
    with products(model.encoder) as seen:
        compute_features(model.encoder, processor, examples, tmp_path / "rounded", cache=shared, compute="bfloat16")
    assert only(seen, BF16)
    assert len(list(shared.iterdir())) == 2
    exact, rounded = (Features(tmp_path / name)["e0"] for name in ("exact", "rounded"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_training_rounds_products_alone(setup: tuple[list[Example], Collator], tmp_path: Path) -> None:
    model, _ = tiny_speech_lm()
    seen: set[torch.dtype] = set()
    losses: list[torch.dtype] = []
    model.language_model.lm_head.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    model.language_model.model.norm.weight.register_post_accumulate_grad_hook(
        lambda weight: losses.append(weight.grad.dtype)
    )
    settings = Settings(epochs=1, batch_size=4, compute="bfloat16")
    train(model, *setup, Method("full", learning_rate=1e-3), settings, tmp_path, name="m")
    assert seen == {BF16}
    assert set(losses) == {torch.float32}
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# -- importance -------------------------------------------------------------------------------------------------------
def test_scores_in_bfloat16_are_float32_sums_near_those_in_float32() -> None:
    model, items = tiny_llama(), make_batches()
    exact = estimate_importance(model, items, REDUCTIONS)
    with products(model) as seen:
        rounded = estimate_importance(model, items, REDUCTIONS, compute="bfloat16")
    assert BF16 in set().union(*seen.values())
    assert (exact.metadata["compute"], rounded.metadata["compute"]) == ("float32", "bfloat16")
    for reduction in REDUCTIONS:
        a, b = (torch.cat([s.tensors(reduction)[n].flatten() for n in s.names]) for s in (exact, rounded))
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99, reduction


def test_sequences_keep_their_one_backward_in_bfloat16() -> None:
    """Their gradients are the products of rounded factors, formed in float32: between those of rows one by one, which
    autocast rounds once more, and these there is no more than that rounding."""
    model, items = tiny_llama(tied=False), make_batches(2)
    together = estimate_importance(model, items, ("per_sequence_abs", "fisher"), compute="bfloat16")
    assert together.metadata["one_by_one"] == {}
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in items for i in range(len(batch["ids"]))
    ]
    alone = estimate_importance(model, rows, ("per_sequence_abs", "fisher"), compute="bfloat16")
    for reduction in together.reductions:
        for name, tensor in together.tensors(reduction).items():
            other = alone.tensors(reduction)[name]
            assert float((tensor - other).norm() / other.norm()) < 0.03, (reduction, name)


class OneLinear(nn.Module):
    """logits = W x of the input token, one linear layer and no other parameter."""

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.inputs = inputs  # (tokens, in)
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data.copy_(weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return type("Output", (), {"logits": self.layer(self.inputs[input_ids])})


def test_the_gradient_of_a_sequence_is_not_rounded_after_it_was_formed() -> None:
    """By hand: x and d are rounded to bfloat16 by autocast, Σ_t d_t x_tᵀ is not."""
    generator = torch.Generator().manual_seed(3)
    inputs, weight = torch.randn(5, 6, generator=generator), torch.randn(5, 6, generator=generator)
    model = OneLinear(inputs, weight)
    ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    scores = estimate_importance(
        model, [batch], ("per_sequence_abs",), parameters={"w": model.layer.weight}, compute="bfloat16"
    )
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for row in ids:
        x = inputs[row[:-1]].to(BF16)
        logits = x @ weight.to(BF16).T
        chances = logits.float().softmax(1) - nn.functional.one_hot(row[1:], 5)
        gradient = chances.to(BF16).double().T @ x.double()  # products exact, sums in float64
        expected += (gradient * weight.double()).abs()
    found = scores.tensors("per_sequence_abs")["w"].double() * 6  # supervised tokens
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_deactivation_is_seen_inside_an_autocast_around_it() -> None:
    """Autocast keeps rounded copies of weights, and would go on with those from before."""
    model, batch = tiny_llama(), make_batches(1)[0]
    tensors = estimate_importance(model, [batch], ("signed_sum",)).tensors("signed_sum")
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        before, _ = supervised_losses(model, batch)
        with deactivation.deactivate(model, select(tensors, 0.5)):
            during, _ = supervised_losses(model, batch)
        after, _ = supervised_losses(model, batch)
    assert not torch.equal(during, before)
    assert torch.equal(after, before)


# -- recipes and run directories --------------------------------------------------------------------------------------
RECIPE: dict[str, Any] = {
    "name": "r",
    "models": {"language_model": "a", "encoder": "b"},
    "data": {"train": {"source": "facts", "split": "train"}, "heldout": {"source": "facts", "split": "heldout"}},
    "methods": {"full": {"kind": "full"}},
    "evaluation": {"tasks": [{"name": "t", "source": "facts", "split": "heldout"}]},
}


def recipe(training: dict[str, Any] | None = None, **models: Any) -> dict[str, Any]:
    return {**RECIPE, "models": {**RECIPE["models"], **models}, "training": training or {}}


@pytest.mark.parametrize(
    ("training", "models", "said"),
    [
        ({}, {"compute": "float16"}, "models.compute: Input should be 'auto', 'float32' or 'bfloat16'"),
        ({}, {"compute": "float32", "dtype": "bfloat16"}, "compute float32 needs weights in float32; set dtype"),
        ({"compute": "bfloat16"}, {}, "there is no key 'compute' here: models.compute decides"),
        ({"bf16": True}, {}, "there is no key training.bf16 any more, models.compute"),
        ({"bf16": False}, {"compute": "auto"}, "there is no key training.bf16 any more, models.compute"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(training: Any, models: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(recipe(training, **models), "r.yaml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_of_before_computed_in_float32_and_says_so_now() -> None:
    config = parse_config(recipe({"bf16": False, "epochs": 2}), "old/study.yaml")
    assert config.models.compute == "float32"
    assert config == parse_config(recipe({"epochs": 2}, compute="float32"), "r.yaml")
    assert parse_config(recipe(), "r").models.compute == "auto"
    assert "bf16" not in dump_config(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


def fingerprints(models: Path, folder: Path, **options: Any) -> dict[str, str]:
    """Of what goes into every step of a study, without doing any."""

    class Noting(Workspace):
        def step(self, name: str, made_by: Any, inputs: Mapping[str, Any], write: Any, **_: Any) -> None:
            # Of earlier steps the name alone, so that only what depends on the arithmetic itself differs.
            self.done.append(Step(name, folder, name, False))
            found[name] = hash_value(inputs)

    found: dict[str, str] = {}
    places = {"language_model": str(models / "llm"), "encoder": str(models / "whisper"), "device": "cpu"}
    ws = Noting(parse_config(recipe(**places, **options), "r"), folder, Reporter(0, quiet=True))
    for step in steps_of(ws.config):
        step(ws)
    return found


def test_steps_of_one_arithmetic_are_not_those_of_another(models: Path, tmp_path: Path, fast: None) -> None:
    exact, rounded, auto = (
        fingerprints(models, tmp_path, compute=wanted) for wanted in ("float32", "bfloat16", "auto")
    )
    computed = {"features", "perplexity", "checkpoint", "t-text", "t-speech"}
    scored = {"importance", "importance_other", "deactivation"}

    def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
        return {name.rpartition("/")[2] for name in a if a[name] != b[name]}

    assert differing(exact, rounded) == computed | scored
    assert differing(exact, auto) == computed  # auto leaves the others in float32
    assert {name.rpartition("/")[2] for name in exact} - computed - scored == {"data", "probe", "analysis", "maps"}


def test_the_choice_and_its_reason_stand_in_the_provenance(models: Path, tmp_path: Path, fast: None) -> None:
    places = {"language_model": str(models / "llm"), "encoder": str(models / "whisper"), "device": "cpu"}
    ws = Workspace(parse_config(recipe(**places), "r"), tmp_path, Reporter(0, quiet=True))
    ws.__dict__["groups"] = {}
    assert ws.settings.compute == "bfloat16"
    assert ws.provenance(0.0)["compute"] == {
        "wanted": "auto",
        "device": "cpu",
        "dtype": "bfloat16",
        "reason": "this machine is fast",
        "importance": {"dtype": "float32", "reason": EXACT},
        "deactivation": {"dtype": "float32", "reason": EXACT},
    }


def test_plan_counts_what_the_recipe_computes_in(models: Path, fast: None) -> None:
    places = {"language_model": str(models / "llm"), "encoder": "embedded:whisper-tiny.en", "device": "cpu"}
    for wanted, options, autocast in (
        ("float32", Assumptions(gpu="H100"), False),
        ("auto", Assumptions(gpu="H100"), True),
        ("auto", Assumptions(), True),
        ("bfloat16", Assumptions(), True),
    ):
        plan = make_plan(parse_config(recipe(**places, compute=wanted), "r"), options)
        assert plan.methods[0].setup.autocast is autocast, (wanted, options)


# -- commands ---------------------------------------------------------------------------------------------------------
QUESTIONS = "facts"


def asked(models: Path, out: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"split": "heldout", "limit": 3, "max_new_tokens": 2, "device": "cpu", **options}
    list(evaluate.run(evaluate.Options(str(models / "llm"), QUESTIONS, out, **given)))
    result: dict[str, Any] = read_json(out / "results-text.json")
    return result


def test_evaluate_records_the_choice_and_mixes_no_answers(models: Path, tmp_path: Path, fast: None) -> None:
    found = asked(models, tmp_path, perplexity=True)
    assert found["compute"] == {
        **{"dtype": "bfloat16", "reason": "this machine is fast"},
        **{"device": "cpu", "weights": None},
    }
    assert read_json(tmp_path / "losses-text.json")["compute"] == "bfloat16"
    with pytest.raises(UserError, match=r"holds another evaluation .compute 'bfloat16' instead of 'float32'"):
        asked(models, tmp_path, compute="float32")
    asked(models, tmp_path, compute="bfloat16")  # the same arithmetic, for another reason
    with pytest.raises(UserError, match=r"holds another evaluation .model "):
        asked(models, tmp_path, dtype="bfloat16")


def test_answers_of_before_there_was_the_choice_are_in_float32(models: Path, tmp_path: Path, fast: None) -> None:
    asked(models, tmp_path, compute="float32")
    binding = read_json(tmp_path / "samples-text.json")
    assert binding.pop("compute") == "float32"
    write_json(tmp_path / "samples-text.json", binding)
    asked(models, tmp_path, compute="float32")
    with pytest.raises(UserError, match="compute 'float32' instead of 'bfloat16'"):
        asked(models, tmp_path)


def test_importance_and_deactivate_say_what_they_computed_in(models: Path, tmp_path: Path, fast: None) -> None:
    model, scores = str(models / "llm"), tmp_path / "scores"
    lines = list(importance.run(importance.Options(model, QUESTIONS, scores, limit=4, device="cpu")))
    assert f"computed in float32 ({EXACT})" in lines
    metadata = Scores.open(scores).metadata
    assert (metadata["compute"], metadata["compute_reason"]) == (
        "float32",
        EXACT,
    )
    options = deactivate.Options(model, scores, QUESTIONS, tmp_path / "off", limit=3, random_seeds=1, device="cpu")
    lines = list(deactivate.run(options))
    assert f"computed in float32 ({EXACT})" in lines
    with pytest.raises(UserError, match="scores holds scores already; delete the folder or write elsewhere"):
        list(importance.run(importance.Options("no/model", QUESTIONS, scores)))
    with pytest.raises(UserError, match="off holds a deactivation already"):
        list(deactivate.run(replace(options, limit=2)))
    for record in read_json(tmp_path / "off" / "records.json"):
        assert record["compute"] == {"dtype": "float32", "reason": EXACT, "scores": "float32"}


def test_ask_computes_as_it_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    forward = nn.Linear.forward

    def noting(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        output = forward(layer, x)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(nn.Linear, "forward", noting)
    question = ask.Options(str(models / "llm"), text="What?", max_new_tokens=2, device="cpu")
    ask.answer(question)
    assert seen == {torch.float32}
    seen.clear()
    ask.answer(replace(question, compute="bfloat16"))
    assert seen == {BF16}
    seen.clear()
    ask.answer(replace(question, dtype="bfloat16"))
    assert seen == {BF16}


def test_wrong_values_on_the_command_line(models: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["ask", "--text", "What?", "--compute", "half"])
    assert refused.exit_code == 2
    assert "'half' is not one of 'auto', 'float32', 'bfloat16'" in " ".join(refused.output.split())
    question = ask.Options(str(models / "llm"), text="What?")
    with pytest.raises(UserError, match=r"^There is no device 'gpu'; give auto, cpu, cuda, cuda:0, mps or xpu\.$"):
        ask.answer(replace(question, device="gpu"))
    with pytest.raises(UserError, match=r"^There is no device xpu here \(.*\); give auto or cpu\.$"):
        ask.answer(replace(question, device="xpu"))
    with pytest.raises(UserError, match=r"^There is no device cuda:99 here, CUDA shows \d+; give auto or cpu\.$"):
        ask.answer(replace(question, device="cuda:99"))
    with pytest.raises(UserError, match="Weights in bfloat16 cannot compute in float32"):
        ask.answer(replace(question, device="cpu", dtype="bfloat16", compute="float32"))


def test_every_command_that_runs_a_model_has_the_options() -> None:
    for command in ("evaluate", "importance", "deactivate", "validate-importance", "ask"):
        said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert all(option in said for option in ("--compute", "--device", "--dtype")), command


def test_attention_with_gradients_is_float32_under_autocast() -> None:
    """The queries of SDPA are what they are without autocast; matrix products stay rounded."""
    from torch.nn.functional import scaled_dot_product_attention

    from palimpsest.models.compute import attention_with_gradients

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scaled_dot_product_attention(q, k, v, is_causal=True)
        with attention_with_gradients("cpu"):
            found = scaled_dot_product_attention(q, k, v.bfloat16().float(), is_causal=True)
            assert (q @ k.mT).dtype == torch.bfloat16
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), exact)
    assert torch.equal(found, scaled_dot_product_attention(q, k, v.bfloat16().float(), is_causal=True))
