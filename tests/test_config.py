"""Recipes: every one builds; an unknown key names the nearest; values out of range name the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from palimpsest.commands.evaluate import HUB_NAMES
from palimpsest.config import StudyConfig, dump_config, load_config, parse_config, require_same_recipe
from palimpsest.data.parquet import HUB
from palimpsest.files import UserError
from palimpsest.models.prompts import PRESETS, PromptStyle
from palimpsest.planning.plan import PUBLISHED_ROWS

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "x",
    "models": {"language_model": "a", "encoder": "b"},
    "data": {"train": {"source": "facts", "split": "train"}, "heldout": {"source": "facts", "split": "heldout"}},
    "methods": {"full": {"kind": "full"}},
    "evaluation": {"tasks": [{"name": "facts", "source": "facts", "split": "heldout"}]},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    section: Any = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_says_how_it_is_run(path: Path) -> None:
    config = load_config(path)
    header = path.read_text().split("\nname:")[0]
    assert "command" in header
    assert "hardware" in header
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def leaves(section: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    if not isinstance(section, (dict, list)):
        yield path
        return
    for key, value in section.items() if isinstance(section, dict) else enumerate(section):
        yield from leaves(value, *path, key)


def test_the_first_recipe_of_the_documentation_has_what_is_required_and_no_more() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    text = page.split("## A first recipe")[1].split("```yaml\n")[1].split("```")[0]
    assert parse_config(yaml.safe_load(text), "first").methods["full"].learning_rate == 2e-5
    for *parents, last in leaves(yaml.safe_load(text)):
        without = yaml.safe_load(text)
        section = without
        for key in parents:
            section = section[key]
        del section[last]
        with pytest.raises(UserError, match=r"^first: "):
            parse_config(without, "first")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("sed", "seed"),
        ("training.epoch", "epochs"),
        ("methods.full.learning_rat", "learning_rate"),
        ("data.train.sorce", "source"),
        ("importance.reducton", "reduction"),
        ("training.max_token", "max_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(path: str, near: str) -> None:
    with pytest.raises(UserError, match=f"there is no key '{path}'; the nearest known key is '{near}'"):
        parse_config(changed(path, 1), "recipe.yaml")


@pytest.mark.parametrize(
    ("path", "section", "slip", "near"),
    [
        ("methods.full.pull", {"strenght": 100}, "strenght", "strength"),
        ("methods.full.pull", {"by_": "plain", "strenght": 100}, "strenght", "strength"),
        ("methods.full.slow", {"tpo": 0.03, "scale": 0.5}, "tpo", "top"),
        ("methods.full", {"kin": "full"}, "kin", "kind"),
        ("data.train", {"sorce": "facts"}, "sorce", "source"),
    ],
)
def test_a_slip_in_a_key_that_must_be_given_is_named_and_not_only_missed(
    path: str, section: dict[str, Any], slip: str, near: str
) -> None:
    with pytest.raises(UserError, match=f"there is no key '{path}.{slip}'; the nearest known key is '{near}'"):
        parse_config(changed(path, section), "r")


def test_a_key_that_must_be_given_and_is_not_there_is_missed() -> None:
    with pytest.raises(UserError, match=r"^r: methods\.full\.pull\.strength: Field required"):
        parse_config(changed("methods.full.pull", {"by": "plain"}), "r")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("deactivation.ratio", 1.5),
        ("methods.full.lambda_", 2),
        ("training.batch_size", 0),
        ("methods", {}),
        ("training.epochs", float("inf")),
        ("methods.full.learning_rate", float("nan")),
    ],
)
def test_values_out_of_range_name_the_key(path: str, value: Any) -> None:
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        parse_config(changed(path, value), "recipe.yaml")


@pytest.mark.parametrize(
    ("path", "value"), [("deactivation.scope", 3), ("speech.voice", 3), ("deactivation.scope", {})]
)
def test_a_value_of_another_type_names_the_key_alone(path: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^r: {path}: Input should be"):
        parse_config(changed(path, value), "r")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "full", "importance": "shuffled"}, "belongs to kind layer_lr; full does not use it"),
        ({"kind": "adaptor", "modality": "text"}, "would train nothing"),
    ],
)
def test_methods_that_make_no_sense_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"methods.m: .*{message}"):
        parse_config(changed("methods.m", method), "recipe.yaml")


def test_lora_is_not_merged_into_bfloat16_weights() -> None:
    half = {**MINIMAL, "models": {**MINIMAL["models"], "dtype": "bfloat16"}}
    assert parse_config(half, "r.yaml").models.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"r.yaml.*models.dtype bfloat16 would round most .* methods.low \(lora\)"):
        parse_config({**half, "methods": {**MINIMAL["methods"], "low": {"kind": "lora"}}}, "r.yaml")


def test_no_method_is_called_base_and_no_task_comes_twice() -> None:
    with pytest.raises(UserError, match="not 'base'"):
        parse_config(changed("methods.base", {"kind": "full"}), "r")
    with pytest.raises(UserError, match="'full-seed1' is that of a training run of 'full'"):  # of one run each too
        parse_config(changed("methods.full-seed1", {"kind": "full"}), "r")
    task = MINIMAL["evaluation"]["tasks"][0]
    with pytest.raises(UserError, match="twice"):
        parse_config(changed("evaluation.tasks", [task, task]), "r")


@pytest.mark.parametrize("device", ["cdua", "cuda:x", "", "CPU"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"models: there is no device '{device}'; give auto, cpu, cuda"):
        parse_config(changed("models.device", device), "r")


@pytest.mark.parametrize("name", ["web/questions", "../../x", "a b", "", ".", "x.y"])
def test_names_of_methods_and_tasks_are_names_of_folders(name: str) -> None:
    with pytest.raises(UserError, match="must be letters, digits, - and _"):
        parse_config(changed("methods", {name: {"kind": "full"}}), "r")
    task = {**MINIMAL["evaluation"]["tasks"][0], "name": name}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.0: the task name .* must be letters, digits, - and _"):
        parse_config(changed("evaluation.tasks", [task]), "r")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(MINIMAL) + "seed: 1\nmodels:\n  language_model: c\n")
    with pytest.raises(UserError, match=r"the key 'models' stands twice.*line \d+"):
        load_config(recipe)
    recipe.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")  # what a merge brings may be given again
    with pytest.raises(UserError, match="name: Field required"):
        load_config(recipe)


def test_held_out_data_is_a_split_or_a_number_and_not_both() -> None:
    train = MINIMAL["data"]["train"]
    config = parse_config(changed("data", {"train": train, "heldout_examples": 500}), "r")
    assert config.data.heldout is None
    assert config.data.heldout_examples == 500
    for data in ({"train": train}, {**MINIMAL["data"], "heldout_examples": 500}):
        with pytest.raises(UserError, match="data: give exactly one of heldout"):
            parse_config(changed("data", data), "r")


def test_filters_are_checked_like_every_key() -> None:
    with pytest.raises(
        UserError, match=r"'data\.filters\.max_answer_word'; the nearest known key is 'max_answer_words'"
    ):
        parse_config(changed("data.filters", {"max_answer_word": 3}), "r")
    with pytest.raises(UserError, match=r"data\.filters\.max_audio_seconds"):
        parse_config(changed("data.filters", {"max_audio_seconds": 31}), "r")


def test_a_config_cannot_be_changed() -> None:
    config = StudyConfig.model_validate(MINIMAL)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_the_same_recipe_passes_and_another_is_named(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    config = parse_config(changed("training.report_to", ["wandb"]), "r")
    require_same_recipe(config, file)  # nothing there yet
    file.write_text(dump_config(config))
    require_same_recipe(config, file)
    other = parse_config(changed("methods.full.learning_rate", 1.0), "r")
    with pytest.raises(
        UserError, match=r"methods\.full\.learning_rate: 2e-05 → 1\.0; .*report_to: \[\"wandb\"\] → \[\]"
    ):
        require_same_recipe(other, file)
    file.write_text(yaml.safe_dump(MINIMAL))  # an older version without the new keys
    require_same_recipe(parse_config(MINIMAL, "r"), file)
    file.write_text("old_key: 1\n")
    with pytest.raises(UserError, match="of another version and cannot be compared"):
        require_same_recipe(config, file)


# ----------------------------------------------------------------------------------------------------------------------
# Scopes and prompts
# ----------------------------------------------------------------------------------------------------------------------
def test_one_scope_or_a_list_of_them() -> None:
    assert parse_config(MINIMAL, "r").deactivation.scopes == ("global",)
    one = parse_config(changed("deactivation.scope", "per_matrix"), "r")
    assert (one.deactivation.scopes, one.deactivation.scope) == (("per_matrix",), "per_matrix")
    assert "scope: per_matrix\n" in dump_config(one)  # as before there were lists
    both = parse_config(changed("deactivation.scope", ["per_matrix", "global"]), "r")
    assert both.deactivation.scopes == ("per_matrix", "global")
    assert parse_config(yaml.safe_load(dump_config(both)), "dump") == both


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("per_row", "there is no scope 'per_row'; give global, per_layer, per_matrix, or a list of them"),
        (["global", "per_row"], "there is no scope 'per_row'; give global, per_layer, per_matrix, or a list of them"),
        ([], r"scope \[\] must name one or more of global, per_layer, per_matrix, each once"),
        (["global", "global"], r"scope \['global', 'global'\] must name one or more of .*, each once"),
    ],
)
def test_a_scope_that_is_none_is_one_sentence(scope: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^r: deactivation: {message}\.$"):
        parse_config(changed("deactivation.scope", scope), "r")


def test_a_preset_is_its_words_and_keys_beside_it_win() -> None:
    style = parse_config(changed("prompt", {"preset": "llama_omni", "date": "2025-02-01"}), "r").prompt
    assert style == PromptStyle(
        "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
        "Please directly answer the questions in the user's speech.",
        "2025-02-01",
    )
    own = parse_config(changed("prompt", {"preset": "llama_omni", "system": None}), "r").prompt
    assert (own.system, own.speech_instruction) == (None, style.speech_instruction)
    assert parse_config(changed("prompt", {"preset": "plain"}), "r").prompt == PromptStyle()
    assert parse_config(changed("prompt", {"preset": None}), "r").prompt == PromptStyle()


def test_a_preset_and_its_words_written_out_are_the_same_recipe(tmp_path: Path) -> None:
    named = parse_config(changed("prompt", {"preset": "llama_omni"}), "r")
    written = parse_config(changed("prompt", PRESETS["llama_omni"]), "r")
    assert named == written
    (tmp_path / "study.yaml").write_text(dump_config(named))
    assert "preset" not in dump_config(named)  # what is recorded is the text, whatever a later version calls it
    require_same_recipe(written, tmp_path / "study.yaml")
    with pytest.raises(UserError, match=r"holds a study of another recipe \(prompt\.s"):
        require_same_recipe(
            parse_config(changed("prompt", {"preset": "llama_omni_short"}), "r"), tmp_path / "study.yaml"
        )


@pytest.mark.parametrize("name", ["llama-omni", "", 3, ["plain"]])
def test_a_preset_that_is_none_names_those_there_are(name: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"^r: prompt: there is no preset .*; give plain, llama_omni_short, llama_omni, or write the keys out\.$",
    ):
        parse_config(changed("prompt", {"preset": name}), "r")


def test_an_unknown_key_of_the_prompt_may_be_meant_for_preset() -> None:
    with pytest.raises(UserError, match="r: prompt: there is no key 'prset'; the nearest known key is 'preset'"):
        parse_config(changed("prompt.prset", "plain"), "r")


@pytest.mark.parametrize("name", ["paper-1b", "paper-8b"])
def test_the_papers_recipes_measure_both_scopes(name: str) -> None:
    config = load_config(RECIPES[0].parent / f"{name}.yaml")
    assert config.deactivation.scopes == ("global", "per_matrix")


@pytest.mark.parametrize("name", ["paper-1b", "paper-8b", "lora-rank", "layer-lr-lambda"])
def test_the_papers_recipes_name_their_wording(name: str) -> None:
    path = RECIPES[0].parent / f"{name}.yaml"
    preset = yaml.safe_load(path.read_text())["prompt"]["preset"]
    assert load_config(path).prompt == PromptStyle(**PRESETS[preset])


def test_the_sets_of_spoken_web_questions_are_known_wherever_one_is() -> None:
    names = {"fixie-ai/spoken-web-questions", "chiyuanhsiao/spoken-web-questions"}
    assert {HUB[name] for name in names} == {"spoken_web_questions"}
    assert {PUBLISHED_ROWS[name] for name in names} == {2032}
    assert {HUB_NAMES[name] for name in names} == {"web_questions"}
    for recipe in ("paper-1b", "paper-8b"):
        text = (RECIPES[0].parent / f"{recipe}.yaml").read_text()
        assert all(name in text for name in names)


def test_unreadable_recipes(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="mapping"):
        load_config(tmp_path / "list.yaml")


def test_the_recipe_of_the_dose_study_is_one_and_its_curves_are_those_of_its_plan() -> None:
    config = load_config(Path(__file__).parent.parent / "results" / "dose" / "recipe.yaml")
    curves = {str(method.curve) for method in config.methods.values()}
    assert curves == {"full", "layer_lr", "lora", "full_text", "full_own", "lora_own"}
    assert len(config.methods) == 3 * 4 + 2 * 2  # rates; two where the answers are the base's own


def test_the_frontier_of_the_dose_study_has_the_methods_of_its_plan() -> None:
    config = load_config(Path(__file__).parent.parent / "results" / "dose-frontier" / "recipe.yaml")
    points: dict[str, int] = {}
    for name, method in config.methods.items():
        points[method.curve or name] = points.get(method.curve or name, 0) + 1
    curves = {"full": 4, "layer_lr": 2, "layer_lr_mean": 2, "lora": 2, "blend": 3}
    assert points == curves | dict.fromkeys(("lora_r24", "replay", "pull", "slow"), 1)
    in_full = {name for name, method in config.methods.items() if not method.is_point}
    assert in_full == {"full", "layer_lr", "lora", "lora_r24"}
