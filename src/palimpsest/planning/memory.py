"""Memory and arithmetic of a training step by formula, before anything is loaded.

Letters: d hidden size, q heads × head size, f MLP width, L layers, V vocabulary, r LoRA rank, B rows of a batch, S its
longest sequence, T = B·S tokens, n supervised tokens. What autograd keeps of one decoder layer (Llama's: two RMS norms,
rotary attention through a fused kernel, gated MLP; keys and values repeated to q, as under a padding mask) was derived
tensor by tensor, and tests/test_training_budget.py compares it with what autograd really saves:

    bytes per token and layer, full or layer_lr    float32: 24 d + 16 q + 16 f        both norms' input, output before
                                                   bf16 autocast: 26 d + 8 q + 8 f    and after the weight; q, k, v and
                                                   bf16 weights: 16 d + 8 q + 8 f     attention's output; 4 of the MLP

and in all cases 4·heads + 8 + (padding mask) bytes·S. LoRA and `adaptor` keep less: a frozen norm needs no input.
Autocast also keeps a bf16 copy of every matrix from forward to backward.

Memory is not the sum of its parts: backward frees a layer's activations as it fills its gradients. So the peak is that
of three moments (`Memory.moments`), each on top of weights and optimizer state.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal

from palimpsest.training.methods import MethodKind
from palimpsest.training.remedies import AT_ONCE

# Outside the tensors. CPU: Python with torch, transformers and peft. CUDA: context, kernels and cuBLAS workspace, which
# torch.cuda.max_memory_allocated does not show.
RUNTIME_BYTES = {"cpu": 550_000_000, "cuda": 1_000_000_000}
# glibc keeps much of what a step has freed in its heap, in pieces; measured, as a share of the activations, with
# checkpointing too (all are computed, piece by piece)
# (benchmarks/plan.py, docs/machines.md). CUDA's fragmentation is left to the margin of nominal memory.
ALLOCATOR_SHARE = {"cpu": 0.5, "cuda": 0.0}
ADAM_STATES = 2  # AdamW: first and second moment, in the precision of the weights
ACCUMULATED = 4  # bytes of a score, float32
PIECE = 1 << 24  # weights whose gradient is folded at a time on CUDA, with three temporaries (importance/reduce.py)
N_PROJECTIONS = 7  # q, k, v, o, gate, up, down: what LoRA wraps in a Llama layer
N_PIECES = 6  # float32 arrays of a piece of tokens while two distributions are compared (training/keep.py)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a causal language model. `matrices`: the 2-D weights of its layers; `lora_sides`: their Σ(in + out)."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    parameters: int
    matrices: int
    lora_sides: int

    @property
    def attention(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Encoder:
    """Sizes of a Whisper encoder, frozen."""

    parameters: int
    dim: int
    layers: int


@dataclass(frozen=True)
class Setup:
    """What is trained and how: everything but the batch."""

    decoder: Decoder
    encoder: Encoder
    method: MethodKind
    rank: int = 8
    tuner_parameters: int = 0  # of kind peft: what its tuner trains
    new_layers: int = 0  # of kind inserted: how many of the decoder's layers are new …
    new_parameters: int = 0  # … and what is in them
    modality: Literal["speech", "text"] = "speech"
    stack_factor: int = 5
    adaptor_hidden: int = 2048
    speech_tokens: int = 0  # rows in the place of the adaptor
    weight_bytes: int = 4  # 4: float32, 2: bfloat16
    autocast: bool = False  # bf16 arithmetic on float32 weights
    checkpointing: bool = False
    accumulation: int = 1
    fused_loss: bool = False  # Liger's kernel: no logits
    device: Literal["cpu", "cuda"] = "cuda"
    n_gpus: int = 1  # weights, gradients and optimizer state sharded over them (FSDP2)
    in_loop: bool = False  # the encoder runs in every step, and stays whole on every device
    distill: bool = False  # the base's distributions are learned
    pull: Literal["plain", "fisher", "importance"] | None = None
    slow: float = 0.0  # share of the scored weights

    @property
    def adaptor_parameters(self) -> int:
        stacked = self.encoder.dim * self.stack_factor
        if not stacked:  # no encoder
            return 0
        if self.speech_tokens:
            return self.speech_tokens * self.decoder.hidden
        return (stacked + 1) * self.adaptor_hidden + (self.adaptor_hidden + 1) * self.decoder.hidden

    @property
    def lora_parameters(self) -> int:
        if self.method == "peft":
            return self.tuner_parameters
        return self.rank * self.decoder.lora_sides if self.method == "lora" else 0

    @property
    def trainable(self) -> int:
        adaptor = self.adaptor_parameters if self.modality == "speech" else 0
        if self.method in ("given", "blend"):
            return 0
        if self.method == "adaptor":
            return adaptor
        if self.method == "inserted":
            return adaptor + self.new_parameters
        return adaptor + (self.lora_parameters if self.has_adapter else self.decoder.parameters)

    @property
    def has_adapter(self) -> bool:
        """LoRA, or another tuner, of which what it keeps is taken to be what LoRA of this rank does."""
        return self.method in ("lora", "peft")

    @property
    def trains_decoder(self) -> bool:
        return self.method in ("full", "layer_lr")

    @property
    def held_back(self) -> int:
        """Bytes of what holds the weights back: the base once more as the teacher of full fine-tuning (of inserted
        layers in parts too) and once more for a pull, a float32 number of each score it weighs by; value and position
        (int64) of each slowed weight."""
        decoder, w = self.decoder, self.weight_bytes
        taught = self.trains_decoder or (self.method == "inserted" and self.n_gpus > 1)
        copies = int(self.distill and taught) + int(self.pull is not None)
        scores = 4 * decoder.matrices if self.pull in ("fisher", "importance") else 0
        of_base = w * (decoder.parameters - self.new_parameters)
        return copies * of_base + scores + round(self.slow * decoder.matrices) * (w + 8)

    @property
    def casts(self) -> bool:
        """Whether autograd keeps bf16 copies of float32 weights and activations. Sharded, layers come in bf16 whole."""
        return self.autocast and self.weight_bytes == 4 and self.n_gpus == 1

    @property
    def stream_bytes(self) -> int:
        """Of a number between the layers."""
        return self.compute_bytes if self.n_gpus > 1 else self.weight_bytes

    @property
    def compute_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes


@dataclass(frozen=True)
class Batch:
    """The largest batch on one device."""

    rows: int
    length: int  # longest sequence, tokens, speech positions included
    positions: int  # speech positions of a row
    supervised: int  # supervised tokens of a row
    columns: int  # positions in which some row is supervised: those the head is computed at

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `in_use`: weights, optimizer, held back, gathered, runtime and the largest of `moments`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward
    logits: int  # what the loss needs for a moment on top
    gathered: int  # weights and gradients brought together from the other devices
    runtime: int
    allocator: int  # freed, but not given back
    moments: dict[str, int]
    held_back: int = 0  # of the base, by what holds the weights back

    @property
    def in_use(self) -> int:
        always = self.weights + self.optimizer + self.held_back + self.gathered + self.runtime
        return always + max(self.moments.values())

    @property
    def peak(self) -> int:
        return self.in_use + self.allocator


def memory(setup: Setup, batch: Batch) -> Memory:
    """Peak memory of a training step on one device, the optimizer's state being there already."""
    shard = setup.n_gpus
    decoder, w = setup.decoder, setup.weight_bytes
    # peft keeps the matrices of LoRA in float32 whatever the model's precision; the adaptor has the model's.
    lora = 4 * setup.lora_parameters
    weights = w * (decoder.parameters + setup.adaptor_parameters + setup.encoder.parameters) + lora
    whole = w * setup.encoder.parameters if setup.in_loop else 0
    gradients = lora + w * (setup.trainable - setup.lora_parameters)
    kept, logits = activation_bytes(setup, batch), logit_bytes(setup, batch)
    embedding = decoder.vocabulary * decoder.hidden * w if setup.trains_decoder else 0
    held = -(-gradients // shard) if setup.accumulation > 1 else 0  # of the batches before, in the same step
    moments = {
        "the loss is computed": held + kept + logits,
        "backward reaches the head": held + kept + embedding,  # its gradient is the first, and a tied one waits
        "backward ends": -(-gradients // shard) + (embedding if decoder.tied else 0) + kept // decoder.layers,
    }
    return Memory(
        weights=whole - (whole - weights) // shard,
        gradients=-(-gradients // shard),
        optimizer=-(-ADAM_STATES * gradients // shard),
        activations=kept,
        logits=logits,
        gathered=_gathered(setup) if shard > 1 else 0,
        runtime=RUNTIME_BYTES[setup.device],
        allocator=round(ALLOCATOR_SHARE[setup.device] * activation_bytes(replace(setup, checkpointing=False), batch)),
        moments=moments,
        held_back=-(-setup.held_back // shard),
    )


def importance_parts(setup: Setup, batch: Batch, accumulators: int) -> dict[str, int]:
    """Peak memory of scoring a language model, by part: a backward whose gradients are folded and freed one by one.

    accumulators: bytes of them on the device.
    """
    largest = setup.decoder.hidden * setup.decoder.intermediate
    folded = 3 * 4 * min(PIECE, largest) if setup.device == "cuda" else 0
    whole = activation_bytes(replace(setup, checkpointing=False), batch)
    return {
        "weights": setup.weight_bytes * setup.decoder.parameters,
        "accumulators": accumulators,
        "activations": activation_bytes(setup, batch),
        "loss or gradient": max(logit_bytes(setup, batch), setup.weight_bytes * largest + folded),
        "runtime": RUNTIME_BYTES[setup.device] + round(ALLOCATOR_SHARE[setup.device] * whole),
    }


def layer_bytes_per_token(setup: Setup) -> dict[str, int]:
    """What autograd keeps of one decoder layer, bytes per token, by part; without the mask and copies of weights."""
    d, q, f = setup.decoder.hidden, setup.decoder.attention, setup.decoder.intermediate
    c, stream, lora = setup.compute_bytes, setup.stream_bytes, setup.has_adapter
    adapter = 2 if setup.n_gpus > 1 and setup.autocast else 4
    parts = {
        # The input of each of two norms in float32, as the norm computes; before its own weight, if that is trained.
        "norms": 2 * 4 * d + (2 * stream * d if setup.trains_decoder else 0),
        # The norms' outputs are the inputs of the projections, which need them only to train a weight.
        "projections": 0,
        "attention": 4 * c * q,  # q, k, v, output
        "mlp": 3 * c * f,  # gate, its activation, up
        "lora": 0,
        "statistics": 4 * setup.decoder.heads + 2 * 4,  # of attention's softmax and the norms, float32
    }
    if setup.trains_decoder or (lora and c == stream == adapter):
        parts["projections"] = c * ((5 if setup.casts else 2) * d + f)
    elif lora:
        # The adapter's input is cast to its float32, and under autocast back to bf16: a copy for each projection.
        parts["projections"] = (2 if setup.autocast else 4) * (5 * d + q + f)
    if lora:
        parts["lora"] = N_PROJECTIONS * setup.rank * (2 if setup.autocast else 4)
    return parts


def activation_bytes(setup: Setup, batch: Batch) -> int:
    """What is kept from forward to backward, without the loss."""
    decoder, c = setup.decoder, setup.compute_bytes
    copies = 2 * (decoder.matrices + setup.lora_parameters) // decoder.layers if setup.casts else 0  # bf16, of weights

    def per_layer(of: Setup) -> int:
        return batch.tokens * (sum(layer_bytes_per_token(of).values()) + c * batch.length) + copies  # the mask: B·S·S

    stream = setup.stream_bytes
    new = per_layer(replace(setup, method="full")) if setup.new_layers else 0
    if setup.checkpointing:  # inputs; one layer at a time anew
        layers = decoder.layers * batch.tokens * stream * decoder.hidden + max(new, per_layer(setup))
    else:
        layers = setup.new_layers * new + (decoder.layers - setup.new_layers) * per_layer(setup)
    final_norm = batch.tokens * (4 + (stream if setup.trains_decoder else 0)) * decoder.hidden
    head = c * batch.rows * batch.columns * decoder.hidden if setup.trains_decoder else 0
    if setup.casts:
        head += 2 * decoder.vocabulary * decoder.hidden
    adaptor = 0
    if setup.modality == "speech":
        stacked = setup.stack_factor * setup.encoder.dim
        # Frames as they come (float32), stacked and standardised, between the two linear maps, or of tokens their ids;
        # what is spliced in.
        read = 8 if setup.speech_tokens else stacked * c + setup.adaptor_hidden * c
        adaptor = batch.rows * batch.positions * (stacked * 4 + read + 2 * decoder.hidden * stream)
    return layers + final_norm + head + adaptor


def logit_bytes(setup: Setup, batch: Batch) -> int:
    """The loss at its largest: log-probabilities, their gradient and the gradient of the logits (float32), n × V each;
    or, where that is more, the logits of all columns in which some row is supervised."""
    if setup.fused_loss:
        return 0
    n, c, v = batch.rows * batch.supervised, setup.compute_bytes, setup.decoder.vocabulary
    if setup.distill:  # logits of both models, at first of every column; the gradient takes the place of the base's
        pieces = N_PIECES * 4 * min(n * v, AT_ONCE)
        return max(c * (batch.rows * batch.columns + 2 * n) * v, 2 * c * n * v + pieces)
    selected = 3 * 4 * n * v + (2 * n * v if c == 2 else 0)
    every_column = (c * batch.rows * batch.columns + 4 * n + c * n) * v
    return max(selected, every_column)


def _gathered(setup: Setup) -> int:
    """Sharded: two layers whole, and all that is in no layer, with the gradients of one and of the rest."""
    decoder, c = setup.decoder, setup.compute_bytes
    layer = decoder.matrices // decoder.layers
    rest = decoder.parameters - decoder.matrices + setup.adaptor_parameters
    reduced = c + (4 if setup.autocast else 0)  # gradients are added up over devices in float32
    trained = layer + rest if setup.trains_decoder else layer if setup.new_layers else 0
    return c * (2 * layer + rest) + reduced * trained


def largest_rows(setup: Setup, batch: Batch, capacity: int) -> int:
    """The most rows of such a batch whose peak stays within `capacity` bytes; 0: not even one."""
    return bisect_right(range(1, capacity + 1), capacity, key=lambda n: memory(setup, replace(batch, rows=n)).peak)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------
def step_flops(setup: Setup, tokens: float, length: float, positions: float, supervised: float) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens in sequences of `length`, of which
    `positions` are speech and `supervised` have a loss. Recomputation under checkpointing is not counted.

    A trained matrix costs 6 per weight and token (2 forward, 2 for its input's gradient, 2 for its own), a frozen one
    4; attention 6·L·q·S per token (12, halved: causal); the head only where something is supervised. To distil, the
    base runs forward once more (2), as if its questions as text were as long as speech.
    """
    decoder = setup.decoder
    per_weight = 6 if setup.trains_decoder else 4
    layers = (per_weight * decoder.matrices + 6 * setup.lora_parameters + 2 * setup.new_parameters) * tokens
    attention = 6 * decoder.layers * decoder.attention * length * tokens
    head = per_weight * decoder.vocabulary * decoder.hidden * supervised
    # A row is looked up, after its centroid was found: a product with all of them, forward alone. Of a codec there is
    # none, and this is a little too much.
    of_position = 2 * setup.speech_tokens * setup.encoder.dim if setup.speech_tokens else 6 * setup.adaptor_parameters
    adaptor = of_position * positions if setup.modality == "speech" else 0
    if setup.distill:
        attention += 2 * decoder.layers * decoder.attention * length * tokens
        layers += 2 * decoder.matrices * tokens + 2 * decoder.vocabulary * decoder.hidden * supervised
    return layers + attention + head + adaptor


def recomputed_flops(setup: Setup, tokens: float, length: float) -> float:
    """What gradient checkpointing adds: the layers' forward once more."""
    decoder = setup.decoder
    if not setup.checkpointing:
        return 0.0
    return (2 * decoder.matrices + 2 * decoder.layers * decoder.attention * length) * tokens


def encoder_flops(encoder: Encoder, frames: float, frames_per_utterance: float) -> float:
    """One forward pass: 2 per parameter and frame, and attention over the utterance, both ways."""
    return (2 * encoder.parameters + 4 * encoder.layers * encoder.dim * frames_per_utterance) * frames


def optimizer_traffic(setup: Setup) -> int:
    """Bytes that one AdamW step reads and writes: weight, gradient, two states read; all but the gradient written."""
    return 7 * setup.weight_bytes * setup.trainable
