"""A plan in words and numbers: tables of memory, time and disk, the formulas behind them, and what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from palimpsest.config import load_config
from palimpsest.files import UserError
from palimpsest.planning.memory import largest_rows, memory, optimizer_traffic
from palimpsest.planning.needs import most_disk
from palimpsest.planning.plan import BANDWIDTH_SHARE, GB, Assumptions, Plan, make_plan
from palimpsest.report.table import Cell, Column, Table, to_plain

FORMULAS = (
    "Formulas (docs/machines.md derives them). d hidden, q heads × head size, f MLP width, L layers, V vocabulary, T",
    "tokens of the largest batch, S its longest row, w bytes of a weight, n supervised tokens",
    "  weights      w · (language model + encoder + adaptor), 4 · LoRA",
    "  gradients    w · trained             optimizer  2 · gradients (AdamW)",
    "  activations  L · T · (24 d + 16 q + 16 f) in float32; (26 d + 8 q + 8 f) + 2 a weight in bf16 autocast;",
    "               (16 d + 8 q + 8 f) with bf16 weights; less where norms and matrices are frozen; with gradient",
    "               checkpointing L · T · d · w and one layer; besides, the adaptor's and the last norm's",
    "  loss         12 n V (float32), or the head's output at every supervised column; none with a fused kernel",
    "  peak         weights + optimizer + runtime + allocator + the largest of: activations + loss; activations + the",
    "               head's gradient; all gradients + one layer. These two do not peak together",
    "  held back    (distill, pull, slow) the base once as a teacher beside full or layer_lr (sharded: inserted too),",
    "               and once for a pull; 4 a score that a pull weighs by, w + 8 a slowed weight; part of the peak",
    "  allocator    on a CPU half of the activations: what glibc keeps of freed memory; on CUDA none",
    "  FLOPs        tokens · (6 · trained matrices, 4 · frozen ones, + 6 L q S), the same of the head at n and of the",
    "               adaptor at speech positions; 2 more with gradient checkpointing",
)


def plan_recipe(recipe: Path, options: Assumptions) -> Iterator[str]:
    """The plan as lines of text. Raises UserError after the last of them if a method does not fit."""
    plan = make_plan(load_config(recipe), options)
    for section in (_what(plan), _memory(plan, options), _steps(plan), _time(plan, options), _disk(plan)):
        yield from section
        yield ""
    yield from FORMULAS
    message = refusal(plan, recipe)
    if message is not None:
        raise UserError(message)


def refusal(plan: Plan, recipe: Path) -> str | None:
    """One sentence about the methods and other steps that do not fit on the device; None if all do."""
    training, steps = _training_refusal(plan), _steps_refusal(plan)
    faults = [fault for fault in (training, steps) if fault is not None]
    return f"{recipe} does not fit: {'; and '.join(faults)}." if faults else None


def _steps_refusal(plan: Plan) -> str | None:
    too_large = [step for step in plan.steps if step.peak > plan.capacity]
    if not too_large:
        return None
    said = []
    for remedy in dict.fromkeys(step.remedy for step in too_large):
        steps = [step for step in too_large if step.remedy == remedy]
        worst = max(steps, key=lambda step: step.peak)
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in worst.parts.items() if size)
        makes_room = f"set {remedy}" if remedy else "no key makes room for that, so take a larger device"
        names = " and ".join(step.name for step in steps)
        said.append(f"{names} would need up to {worst.peak / GB:.1f} GB ({parts}): {makes_room}")
    return f"{plan.device} has {plan.capacity / GB:.1f} GB, where {'; '.join(said)}"


def _training_refusal(plan: Plan) -> str | None:
    too_large = [method for method in plan.methods if method.memory.peak > plan.capacity]
    if not too_large:
        return None
    worst = max(too_large, key=lambda method: method.memory.peak)
    rows = largest_rows(worst.setup, worst.batch, plan.capacity)
    names = ", ".join(method.name for method in too_large)
    sentence = (
        f"{names} would need up to {worst.memory.peak / GB:.1f} GB with "
        f"{worst.batch.rows} rows of {worst.batch.length} tokens, and {plan.device} has {plan.capacity / GB:.1f} GB; "
    )
    if rows:
        config = plan.config.training
        total = worst.batch.rows * config.accumulation
        return sentence + (
            f"the largest batch that fits is {rows} {'row' if rows == 1 else 'rows'}: set training.batch_size to "
            f"{rows * worst.setup.n_gpus} and training.accumulation to {-(-total // rows)}, or gradient_checkpointing"
        )
    setup, batch = worst.setup, replace(worst.batch, rows=1)
    counts = range(setup.n_gpus + 1, 129)
    n = next((n for n in counts if memory(replace(setup, n_gpus=n), batch).peak <= plan.capacity), None)
    more = f"at least {n} such devices are needed (--n-gpus {n})" if n else "no number of such devices is enough"
    return sentence + f"not even a batch of one row fits, and {more}"


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------
def _what(plan: Plan) -> Iterator[str]:
    config, setup = plan.config, plan.setup
    decoder, encoder = setup.decoder, setup.encoder
    training = config.training
    runs = f", {config.seeds} training runs of each" if config.seeds > 1 else ""
    kinds = [method.kind for method in config.methods.values()]
    parts = [f"{_methods(len(plan.methods))}{runs}"] if plan.methods else []
    parts += [
        f"{kinds.count(kind)} {word}" for kind, word in (("given", "given"), ("blend", "blended")) if kind in kinds
    ]
    yield f"{config.name}: {', '.join(parts)}"
    yield (
        f"  language model  {config.models.language_model} ({plan.origins['language model']}): {decoder.parameters:,} "
        f"parameters, {decoder.matrices:,} of them in the matrices of its {decoder.layers} layers"
    )
    if config.models.encoder is not None:
        origin = plan.origins["encoder"]
        yield f"  encoder         {config.models.encoder} ({origin}): {encoder.parameters:,} parameters, frozen"
        of_frames = replace(setup, speech_tokens=0, stack_factor=config.speech.stack_factor).adaptor_parameters
        if any(method.speech != "tokens" for method in config.methods.values()):
            yield f"  adaptor         {of_frames:,} parameters"
        for k in dict.fromkeys(filter(None, map(config.n_rows, config.methods.values()))):
            yield f"  speech tokens   {k:,} rows, {k * decoder.hidden:,} parameters, in the adaptor's place"
        if plan.codec is not None:
            name = config.speech.tokens.codec if config.speech.tokens else None
            yield f"  codec           {name}: {plan.codec:g} tokens a second ({plan.origins['codec']})"
    yield f"  data            {plan.lengths.origin}"
    if not plan.methods:
        return
    arithmetic = "bf16 autocast" if setup.autocast else config.models.dtype
    checkpointing = "with" if training.gradient_checkpointing else "without"
    yield (
        f"  training        {config.models.dtype} weights, {arithmetic} arithmetic, {checkpointing} gradient "
        f"checkpointing; batch {training.batch_size} × {training.accumulation}, {training.epochs:g} epochs; "
        f"{setup.n_gpus} × {plan.device}"
    )


def _memory(plan: Plan, options: Assumptions) -> Iterator[str]:
    if not plan.methods:
        yield "Nothing is trained."
        return
    where = "on each device, weights, gradients and optimizer sharded" if options.n_gpus > 1 else "on the device"
    yield f"Memory {where}, GB (10⁹ bytes), of {plan.capacity / GB:.1f}"
    holds = any(method.memory.held_back for method in plan.methods)
    heads = ["", "trained", "largest batch", "weights", "gradients", "optimizer", "activations", "loss"]
    heads += ["held back"] if holds else []
    heads += (["gathered"] if options.n_gpus > 1 else []) + ["runtime", "allocator", "peak", "at its peak when", ""]
    rows = []
    for method in plan.methods:
        m, batch = method.memory, method.batch
        parts = [m.weights, m.gradients, m.optimizer, m.activations, m.logits]
        parts += [m.held_back] if holds else []
        parts += ([m.gathered] if options.n_gpus > 1 else []) + [m.runtime, m.allocator, m.peak]
        moment = max(m.moments, key=lambda name: m.moments[name])
        sizes = [f"{method.setup.trainable:,}", f"{batch.rows} × {batch.length}", *(f"{n / GB:.2f}" for n in parts)]
        rows.append([method.name, *sizes, moment, "fits" if m.peak <= plan.capacity else "does not fit"])
    yield from _table(heads, rows, words=(0, len(heads) - 2, len(heads) - 1))


def _steps(plan: Plan) -> Iterator[str]:
    """Every process has the whole model in these, however many train together."""
    yield f"Memory of the other steps, GB on each device, of {plan.capacity / GB:.1f}"
    names = list(plan.steps[0].parts)
    rows = [
        [
            step.name,
            *(f"{step.parts[name] / GB:.2f}" for name in names),
            f"{step.peak / GB:.2f}",
            f"{step.host / GB:.2f}",
            "fits" if step.peak <= plan.capacity else "does not fit",
        ]
        for step in plan.steps
    ]
    yield from _table(["", *names, "peak", "host memory", ""], rows, words=(0, len(names) + 3))


def _time(plan: Plan, options: Assumptions) -> Iterator[str]:
    if plan.gpu is None:
        yield "Time: name a GPU with --gpu for an estimate."
        return
    bf16 = plan.setup.compute_bytes == 2
    speed = plan.gpu.bf16 if bf16 else plan.gpu.float32
    yield (
        f"Time on {options.n_gpus} × {plan.gpu.name}: FLOPs / ({options.utilisation:g} × {speed / 1e12:g} TFLOP/s, "
        f"{'bf16 dense' if bf16 else 'float32'}), and AdamW's traffic / "
        f"({BANDWIDTH_SHARE:g} × {plan.gpu.bandwidth / 1e12:g} TB/s) per step; "
        f"{options.utilisation:g} is an assumption (--utilisation)"
    )
    reached = options.utilisation * speed * options.n_gpus
    encoding = plan.encoding_flops * plan.encodings
    times = "once" if plan.frames.path == "cache" else f"{plan.encodings:g} × in the loop"
    rows = [[f"encode the speech, {times}", "", "", f"{encoding:.2e}", _duration(encoding / reached)]]
    all_runs = 0.0
    for method in plan.methods:
        traffic = method.steps * optimizer_traffic(method.setup) / options.n_gpus
        seconds = method.flops / reached + traffic / (BANDWIDTH_SHARE * plan.gpu.bandwidth)
        tokens = method.tokens * plan.config.training.epochs
        rows.append([method.name, f"{tokens:.3g}", f"{method.steps:,}", f"{method.flops:.2e}", _duration(seconds)])
        all_runs += plan.config.seeds * seconds
    exact = plan.gpu.bf16 if plan.importance_bf16 else plan.gpu.float32
    in_float32 = "" if plan.importance_bf16 else ", in float32"
    seconds = plan.importance_flops / (options.utilisation * exact * options.n_gpus)
    rows.append([f"importance of all models{in_float32}", "", "", f"{plan.importance_flops:.2e}", _duration(seconds)])
    for step in plan.written:
        read = step.reads * plan.setup.weight_bytes * plan.setup.decoder.parameters / options.n_gpus
        seconds = step.flops / reached + read / (BANDWIDTH_SHARE * plan.gpu.bandwidth)
        rows.append(
            [f"{step.name}, each text at its limit", f"{step.tokens:.3g}", "", f"{step.flops:.2e}", _duration(seconds)]
        )
    if plan.config.seeds > 1:
        rows.append([f"all methods, {plan.config.seeds} runs of each", "", "", "", _duration(all_runs)])
    yield from _table(["", "tokens", "steps", "FLOPs", "time"], rows)
    yield "Not counted: making speech, deactivation, evaluation, and sums of importance that are not on the device."


def _disk(plan: Plan) -> Iterator[str]:
    config = plan.config
    models = 1 + sum(config.measures(run, "importance") for run in config.runs)
    checkpoints = config.seeds * sum(method.checkpoint for method in plan.methods)
    before = plan.features + plan.other_features + plan.audio
    in_the_end = before + sum(step.kept for step in plan.disk)
    largest = max(plan.disk, key=lambda step: step.passing)
    yield f"Disk, GB: {most_disk(plan.disk, before) / GB:.1f} at most, {in_the_end / GB:.1f} in the end"
    n = len(plan.methods) * config.seeds
    reductions = {1: "one reduction", 2: "two reductions"}[len(config.importance.keep)]
    others = next(step.kept for step in plan.disk if step.name.endswith("importance_other"))
    rows = [
        ["recordings that are no files yet (FLAC)", f"{plan.audio / GB:.2f}"],
        ["encoder frames of the training data (16-bit)", f"{plan.features / GB:.2f}"],
        ["encoder frames of held-out and task questions", f"{plan.other_features / GB:.2f}"],
        [f"importance, {reductions} of {models} model{'s' if models != 1 else ''}", f"{models * plan.scores / GB:.2f}"],
        [f"importance of the base on other questions, {config.importance.keep_other}", f"{others / GB:.2f}"],
        [f"checkpoints of {_methods(n) if config.seeds == 1 else f'{n} training runs'}", f"{checkpoints / GB:.2f}"],
        [f"at most beside these, while {largest.name} is made", f"{largest.passing / GB:.2f}"],
    ]
    yield from _table(["", ""], rows)
    yield f"Encoder frames of the training data: {plan.frames}."


def _methods(n: int) -> str:
    return f"{n} method{'s' if n != 1 else ''}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """The table as lines of text. words: the columns that hold words; the others hold numbers."""
    columns = tuple(Column(title, numeric=i not in words) for i, title in enumerate(titles))
    return to_plain(Table("", "", columns, tuple(tuple(map(Cell, row)) for row in rows))).split("\n")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
