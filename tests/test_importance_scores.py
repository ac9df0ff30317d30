"""Scores on disk: nothing lost, nothing loaded early, nothing damaged accepted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_llama
from torch import Tensor

from palimpsest.files import UserError
from palimpsest.importance import scores as scores_module
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores, model_digest


def estimated() -> Scores:
    input_ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    return estimate_importance(tiny_llama(), [batch, batch], metadata={"modality": "text"})


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
def test_save_and_open(tmp_path: Path, shard_bytes: int) -> None:
    scores = estimated()
    scores.save(tmp_path / "scores", shard_bytes)
    opened = Scores.open(tmp_path / "scores", verify=True)
    assert opened.metadata == scores.metadata
    assert opened.reductions == ("signed_sum", "per_batch_abs")
    assert opened.names == scores.names
    for reduction in scores.reductions:
        assert list(opened.tensors(reduction)) == list(scores.tensors(reduction))  # model order, not the files'
        for name, tensor in scores.tensors(reduction).items():
            assert torch.equal(opened.tensors(reduction)[name], tensor)
    assert np.array_equal(opened.batch_totals, scores.batch_totals)
    assert np.array_equal(opened.batch_tokens, scores.batch_tokens)
    files = len(list((tmp_path / "scores").glob("signed_sum-*.safetensors")))
    assert files == 1 if shard_bytes > 10_000 else files > 1
    assert not list((tmp_path / "scores").glob(".*"))


def test_of_a_reduction_that_is_not_kept_the_sums_are(tmp_path: Path) -> None:
    scores = estimated()
    scores.keeping(["signed_sum"]).save(tmp_path)
    opened = Scores.open(tmp_path, verify=True)
    assert (opened.reductions, opened.estimated) == (("signed_sum",), ("signed_sum", "per_batch_abs"))
    for name, total in zip(opened.names, opened.sums["per_batch_abs"], strict=True):
        assert total == float(scores.tensors("per_batch_abs")[name].numpy().sum(dtype=np.float64))  # to the bit
    assert not list(tmp_path.glob("per_batch_abs*"))
    with pytest.raises(UserError, match="no reduction 'per_batch_abs', only signed_sum"):
        opened.tensors("per_batch_abs")
    none = opened.keeping(())
    assert (none.reductions, none.estimated, none.sums.keys()) == (
        (), scores.reductions, {"signed_sum", "per_batch_abs"}
    )  # fmt: skip


def test_opening_loads_no_tensor_and_access_loads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated().save(tmp_path)
    loaded: list[str] = []
    original = scores_module._StoredTensors.__getitem__

    def spy(self: scores_module._StoredTensors, name: str) -> Tensor:
        loaded.append(name)
        return original(self, name)

    monkeypatch.setattr(scores_module._StoredTensors, "__getitem__", spy)
    tensors = Scores.open(tmp_path).tensors("signed_sum")
    name = list(tensors)[3]
    assert (len(tensors), loaded) == (14, [])
    _ = tensors[name]
    assert loaded == [name]


def test_an_interrupted_save_does_not_pass_for_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = estimated()
    scores.save(tmp_path)

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(scores_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        scores.save(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Scores.open(tmp_path)


@pytest.mark.parametrize("name", ["signed_sum-00000.safetensors", "batches.npz"])
def test_missing_and_truncated_files(tmp_path: Path, name: str) -> None:
    estimated().save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=rf"{name} has {len(whole) - 4} bytes instead of {len(whole)}"):
        Scores.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Scores.open(tmp_path)


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    estimated().save(tmp_path)
    path = tmp_path / "signed_sum-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Scores.open(tmp_path)
    with pytest.raises(UserError, match="checksum"):
        Scores.open(tmp_path, verify=True)


def test_a_folder_without_scores_and_a_reduction_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores.json does not exist"):
        Scores.open(tmp_path)
    with pytest.raises(UserError, match="no reduction 'fisher', only signed_sum, per_batch_abs"):
        estimated().tensors("fisher")


def test_check_model_names_the_first_difference(tmp_path: Path) -> None:
    estimated().save(tmp_path)
    scores = Scores.open(tmp_path)
    model = tiny_llama()
    scores.check_model(model)

    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj.weight was scored"):
        scores.check_model(tiny_llama(num_hidden_layers=1))
    with pytest.raises(UserError, match=r"model.layers.2.self_attn.q_proj.weight of this model was not scored"):
        scores.check_model(tiny_llama(num_hidden_layers=3))
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \(48, 32\) when scored, \(40, 32\) now"):
        scores.check_model(tiny_llama(intermediate_size=40))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    with pytest.raises(UserError, match=rf"{tmp_path}.*weights of model.layers.1.mlp.down_proj.weight differ"):
        scores.check_model(changed)


def test_the_model_digest_is_of_the_scored_weights() -> None:
    model = tiny_llama()
    digest = model_digest(model)
    assert digest == estimated().metadata["model"]
    assert model_digest(model.bfloat16()) != digest
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight += 1  # not scored
    assert model_digest(other) == digest


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_a_file_stays_mapped_only_as_long_as_its_tensors_live(tmp_path: Path) -> None:
    estimated().save(tmp_path)
    tensors = Scores.open(tmp_path).tensors("signed_sum")

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    tensor = next(iter(tensors.values()))
    assert mapped()
    total = tensor.sum().item()
    del tensor
    assert total > 0
    assert not mapped()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("metadata"), r"scores\.json is damaged \(metadata: Field required\); estimate"),
        (lambda record: record.update(files=[]), r"is damaged \(files: "),
        (lambda record: record["batches"].update(bytes="9"), r"is damaged \(batches\.bytes: "),
        (
            lambda record: record["files"]["signed_sum"][0].update(file="../x"),
            r"is damaged \(files\.signed_sum\.0\.file",
        ),
        (lambda record: record["metadata"]["parameters"][0].pop("name"), r"is damaged \(metadata\.parameters\.0\.name"),
    ],
)
def test_a_damaged_record_of_scores_is_one_sentence(tmp_path: Path, change: Any, message: str) -> None:
    estimated().save(tmp_path)
    record = json.loads((tmp_path / "scores.json").read_text())
    change(record)
    (tmp_path / "scores.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        Scores.open(tmp_path)


def test_damaged_totals_of_batches_are_always_found(tmp_path: Path) -> None:
    estimated().save(tmp_path)
    content = bytearray((tmp_path / "batches.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "batches.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"batches\.npz does not match its checksum; estimate"):
        Scores.open(tmp_path)
