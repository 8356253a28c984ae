"""Without padding the update is the same: every gradient, beside the plain path and beside a real HF `Trainer` step.

B matrices are away from their initial 0, where A would have no gradient. The loss alone would prove little: ways of
laying examples end to end that are wrong move it by a few 1e-4, and gradients by as much as they are.
"""

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from families import wake
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from harness.hf_trainer import make_trainer
from harness.parts import Parts, build
from medqa.config import Experiment, Lora
from medqa.data.batches import IGNORED, MicroBatch, divide, pack
from medqa.model import fast_lora
from medqa.model import loss as head
from medqa.model.attention import SEGMENTED, TESTED, padding_needed
from medqa.model.base import add_lora
from medqa.model.fast_lora import draw_bits, kept, use_fast_lora
from medqa.model.loss import LossModel, summed_loss, target_count

LOSSES_WITHIN = 1e-6  # relative
GRADIENTS_WITHIN = 1e-5  # of the largest value in the tensor, in float32
# Rows padded to the longest, to max_length, and with a vocabulary that `[PAD]` has grown.
RECIPES = (
    ("exp_001", "none"), pytest.param(("exp_001", "4bit"), marks=pytest.mark.slow),
    ("exp_002", "4bit"), pytest.param(("exp_002", "none"), marks=pytest.mark.slow),
    ("exp_003", "none"), ("exp_003", "4bit"),
)  # fmt: skip
UPDATE_ROWS = 16
BUDGETS = (1, 300, 10_000)  # an example a micro-batch, several, all in one

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=RECIPES, ids="-".join)
def recipe(request):
    return request.param


def make(tiny, recipe, padding_free: bool, *sets: str) -> Parts:
    name, quantization = recipe
    return wake(
        build(
            tiny(
                name,
                f"model.quantization={quantization}",
                "model.dequantize=auto",
                f"training.padding_free={str(padding_free).lower()}",
                f"training.global_batch_size={UPDATE_ROWS}",
                "tokenization.max_length=96",
                "lora.lora_dropout=0.0",
                "training.max_steps=4",
                "scheduler.warmup_steps=0",
                "optimizer.max_grad_norm=1e9",
                *sets,
            )
        ),
        0.02,
    )


@pytest.fixture(scope="module")
def plain(tiny, recipe) -> tuple[float, Gradients]:
    parts = make(tiny, recipe, False)
    assert not parts.settings.padding_free
    return update(parts, parts.micro_batches(0))


@pytest.fixture(scope="module")
def free(tiny, recipe) -> Parts:
    parts = make(tiny, recipe, True)
    assert parts.settings.padding_free
    assert parts.settings.dequantize == (recipe[1] == "4bit")
    assert not parts.base.is_gradient_checkpointing  # exp_003 asks for it, and there is room without
    return parts


@pytest.fixture(scope="module")
def first(tiny) -> Parts:
    """Of the first recipe, for what does not depend on the recipe."""
    return make(tiny, RECIPES[0], True)


def lora(parts: Parts) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in parts.adapted.named_parameters() if p.requires_grad}


def update(parts: Parts, micro_batches: list[MicroBatch]) -> tuple[float, Gradients]:
    """Loss and gradients of one `train_step`; the weights are put back."""
    before = {name: p.detach().clone() for name, p in lora(parts).items()}
    result = parts.step(micro_batches, max_grad_norm=1e9)
    found = {name: p.grad.clone() for name, p in lora(parts).items()}
    with torch.no_grad():
        for name, parameter in lora(parts).items():
            parameter.copy_(before[name])
    assert len(found) == 28
    assert all(gradient.any() for gradient in found.values())
    return result.loss, found


def worst(ours: Gradients, theirs: Gradients) -> float:
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


def assert_same_update(ours: tuple[float, Gradients], theirs: tuple[float, Gradients]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=LOSSES_WITHIN)
    assert worst(ours[1], theirs[1]) <= GRADIENTS_WITHIN


class Gradient(TrainerCallback):
    """What Trainer has accumulated when it steps."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.found = {name: p.grad.clone() for name, p in lora(self.parts).items()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_update_is_the_plain_one(plain, free, budget):
    micro_batches = free.packed(0, budget)
    assert len(micro_batches) == {1: UPDATE_ROWS, 300: 4, 10_000: 1}[budget] or budget == 300
    assert_same_update(update(free, micro_batches), plain)


def test_the_update_is_that_of_hf_trainer(tiny, recipe, free, tmp_path):
    theirs = make(tiny, recipe, False, "training.max_steps=1")
    kept = Gradient(theirs)
    trainer = make_trainer(theirs, tmp_path, [kept])
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert_same_update(update(free, free.packed(0, 300)), (loss, kept.found))


def not_separated(parts: Parts) -> list[MicroBatch]:
    """Each example sees those before it in its micro-batch."""
    return [dataclasses.replace(m, segments=(m.input_ids.numel(),)) for m in parts.packed(0, 300)]


def test_examples_that_see_each_other_are_noticed_by_gradients_not_by_the_loss(plain, free):
    loss, gradients = update(free, not_separated(free))
    assert worst(gradients, plain[1]) > 0.2
    assert loss == pytest.approx(plain[0], rel=0.05)


def test_a_mean_of_means_is_noticed_by_gradients_not_by_the_loss(free):
    """Each micro-batch's mean over its own targets, and the mean of these: a token weighs by its company."""
    rows = sorted(free.examples["train"], key=lambda example: len(example.input_ids))
    micro_batches = [pack([row], "answer", i) for i, row in enumerate((rows[0], rows[1], *rows[-6:]))]
    right_loss, right = update(free, micro_batches)
    free.adapted.zero_grad()
    total = 0.0
    for micro_batch in micro_batches:
        mean = summed_loss(free.model, micro_batch, free.accelerator.device) / target_count(micro_batch)
        (mean / len(micro_batches)).backward()
        total += mean.item() / len(micro_batches)
    assert worst({name: p.grad for name, p in lora(free).items()}, right) > 0.2
    assert total == pytest.approx(right_loss, rel=0.05)


def test_targets_in_the_answer_alone(tiny):
    parts = make(tiny, ("exp_001", "none"), True, "tokenization.loss_on=answer")
    assert_same_update(update(parts, parts.packed(0, 300)), update(parts, parts.micro_batches(0)))


def test_checkpointing_changes_nothing(tiny, monkeypatch):
    """Turned on where the plan finds no room without it."""
    without = make(tiny, ("exp_001", "none"), True)
    monkeypatch.setattr("harness.parts.available_memory", lambda device: 1)
    parts = make(tiny, ("exp_001", "none"), True)
    assert parts.base.is_gradient_checkpointing
    used, why = parts.settings.changes["model.gradient_checkpointing"][1:]
    assert used == "true"
    assert "the estimate without it is" in why
    assert_same_update(update(parts, parts.packed(0, 300)), update(without, without.packed(0, 300)))


# --- other families


def model_of(family: str, attention: str) -> LossModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).requires_grad_(False)
    adapted = add_lora(base, Lora(lora_dropout=0.0), 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return LossModel(adapted)


@pytest.mark.parametrize("family", TESTED)
def test_every_family_that_runs_without_padding_has_its_gradients(family, first):
    """Beside its own unpatched `sdpa`, one example at a time."""
    generator = torch.Generator().manual_seed(2)
    examples = [
        dataclasses.replace(example, input_ids=torch.randint(3, 300, (n,), generator=generator).int().numpy())
        for example, n in zip(first.examples["train"], (7, 40, 1, 23, 64), strict=False)
    ]
    found = []
    for attention in ("sdpa", SEGMENTED):
        model = model_of(family, attention)
        one_by_one = [[example] for example in examples] if attention == "sdpa" else [examples]
        micro_batches = [pack(chosen, "all") for chosen in one_by_one]
        if attention == "sdpa":
            micro_batches = [padded(micro_batch) for micro_batch in micro_batches]
        losses = [summed_loss(model, micro_batch, torch.device("cpu")) for micro_batch in micro_batches]
        sum(losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(gradients) == 28
        found.append((sum(loss.item() for loss in losses), gradients))
    assert_same_update(found[1], found[0])


def padded(micro_batch: MicroBatch) -> MicroBatch:
    """One example, as a padded micro-batch has it."""
    return dataclasses.replace(micro_batch, attention_mask=torch.ones_like(micro_batch.input_ids), segments=None)


def needs(model_config: dict, **sections) -> str | None:
    return padding_needed(Experiment.model_validate(sections), SimpleNamespace(**model_config))


@pytest.mark.parametrize(
    "config, sections, said",
    [
        ({"model_type": "olmo2"}, {}, "olmo2 models have not been tested without padding"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, {}, "gemma2 caps its attention scores"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, {}, "gemma3_text caps its logits"),
        ({"model_type": "llama"}, {"model": {"attn_implementation": "eager"}}, "eager attention"),
        ({"model_type": "llama"}, {"lora": {"target_modules": ["q_proj", "lm_head"]}}, "lm_head has an adapter"),
        ({"model_type": "mistral", "sliding_window": 128}, {}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, {}, None),
        ({"model_type": "llama"}, {}, None),
    ],
)
def test_what_needs_padding_says_why(config, sections, said):
    found = needs(config, **sections)
    assert found is None if said is None else said in found


# --- memory: no full logits


class Largest(TorchDispatchMode):
    """The most elements of any tensor that comes to be."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_all_tokens_never_are(free, monkeypatch):
    (micro_batch,) = free.packed(0, 10_000)
    logits = micro_batch.input_ids.numel() * free.base.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * logits // 16)
    with Largest() as largest:
        summed_loss(free.model, micro_batch, free.accelerator.device).backward()
    with torch.no_grad(), Largest() as in_evaluation:
        free.evaluator(10_000).row_losses(free.examples["validation"][:16])
    with Largest() as plain:
        summed_loss(free.model, free.micro_batches(0)[0], free.accelerator.device)
    assert largest.elements < logits
    assert in_evaluation.elements < logits
    padded_batch = free.micro_batches(0)[0].input_ids.numel()
    assert plain.elements == padded_batch * free.base.get_output_embeddings().weight.shape[0]


@pytest.mark.parametrize("targets", [0, 1, 7, 8, 9])
def test_the_chunked_loss_is_cross_entropy(targets, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 11 * 4)  # of 4 targets
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(targets, 6, generator=generator, requires_grad=True)
    layer = torch.nn.Linear(6, 11)
    with torch.no_grad():
        layer.bias[10] = -math.inf  # as `[PAD]` has
    right = torch.randint(0, 10, (targets,), generator=generator)
    expected = torch.nn.functional.cross_entropy(layer(hidden), right, reduction="sum")
    ours = head.SummedLoss.apply(hidden, layer.weight, layer.bias, right)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(
        torch.autograd.grad(3 * ours, hidden)[0], torch.autograd.grad(3 * expected, hidden)[0], atol=1e-6
    )
    each = head.chunked_losses(hidden.detach(), layer, right)
    assert torch.allclose(each, torch.nn.functional.cross_entropy(layer(hidden), right, reduction="none"), atol=1e-6)


# --- how an update is cut


@pytest.mark.parametrize("seed", range(50))
def test_pieces_are_as_few_as_can_be_and_even(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
    most, multiple = rng.randint(1, 300), rng.randint(1, 4)
    cuts = divide(lengths, most, multiple)
    pieces = [lengths[a:b] for a, b in itertools.pairwise(cuts)]
    assert [length for piece in pieces for length in piece] == lengths
    assert all(pieces)
    cap = max(most, *lengths)
    assert all(sum(piece) <= cap for piece in pieces)
    fewest = greedy(lengths, cap)
    assert len(pieces) >= fewest
    wanted = min(-(-fewest // multiple) * multiple, len(lengths))
    assert len(pieces) <= wanted
    largest = max(map(sum, pieces))
    assert largest == max(lengths) or greedy(lengths, largest - 1) > wanted  # no smaller largest piece is possible


def greedy(lengths, cap):
    count, held = 1, 0
    for length in lengths:
        if held + length > cap:
            count, held = count + 1, 0
        held += length
    return count


def test_examples_lie_end_to_end(first):
    examples = first.examples["train"][:3]
    packed = pack(examples, "answer", position=5)
    lengths = [len(example.input_ids) for example in examples]
    assert packed.input_ids.shape == (1, sum(lengths))
    assert packed.segments == tuple(lengths)
    assert packed.attention_mask is None
    assert packed.tokens == sum(lengths)
    example, place = packed.token_indices()
    for i, one in enumerate(examples):
        mine = example[0] == i
        assert place[0][mine].tolist() == list(range(lengths[i]))
        labels = packed.labels[0][mine]
        assert (labels[: one.answer_start] == IGNORED).all()
        assert labels[one.answer_start :].tolist() == one.input_ids[one.answer_start :].tolist()
    everything = pack(examples, "all").labels[0]
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    assert [i for i, label in enumerate(everything.tolist()) if label == IGNORED] == starts


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_processes_share_out_the_same_pieces(first, processes):
    whole = first.stream.packed(0, "all", 300, multiple=processes)
    shares = [first.stream.packed(0, "all", 300, processes, i, processes) for i in range(processes)]
    given = sorted((m for share in shares for m in share if m.row_ids), key=lambda m: m.position)
    assert [m.row_ids for m in given] == [m.row_ids for m in whole]
    assert sum(m.order for share in shares for m in share) == sum(m.order for m in first.stream.packed(0, "all", 9999))
    idle = [share for share in shares if not any(m.row_ids for m in share)]
    assert len(idle) == max(0, processes - UPDATE_ROWS)
    for share in idle:  # it takes part, with a gradient of 0
        assert [target_count(m) for m in share] == [0]
        assert share[0].tokens == 0
        loss = summed_loss(first.model, share[0], first.accelerator.device)
        loss.backward()
        assert loss.item() == 0


# --- LoRA (in 16 bits: `test_lean_lora.py`)


def lora_layer(dropout: float, fast: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 10)}).requires_grad_(False)
    model = get_peft_model(layer, LoraConfig(r=3, lora_dropout=dropout, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model["q_proj"].lora_B["default"].weight)
    if fast:
        use_fast_lora(model)
    return model.base_model.model["q_proj"]


def test_a_layer_computed_faster_is_the_layer():
    x = torch.randn(2, 7, 24, requires_grad=True)
    found = []
    for fast in (False, True):
        layer = lora_layer(0.0, fast)
        y = layer(x)
        gradients = torch.autograd.grad(
            y.square().sum(), [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        )
        found.append([y, *gradients])
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
            "lora_A.default.weight",
            "lora_B.default.weight",
        ]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_its_gradients_are_those_of_its_output_with_the_same_dropout_mask():
    """Numerically, in float64, where nothing but the dropout mask is random."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 8), (5, 6), (2, 6), (8, 2))
    ]

    def output(result, x, a, b):
        torch.manual_seed(4)
        return fast_lora._AddLora.apply(result.clone(), x, a, b, 0.7, fast_lora.STEPS // 3, torch.float64)

    assert torch.autograd.gradcheck(output, tensors)
    assert (output(*tensors) - tensors[0]).abs().max() > 0.1


def test_evaluation_has_no_noise():
    layer, x = lora_layer(0.5, True), torch.randn(7, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_its_noise_has_dropouts_law():
    dropped = round(0.05 * fast_lora.STEPS)
    x = torch.empty(1000, 333)
    torch.manual_seed(5)
    bits = draw_bits(x)
    lost = 1 - kept(bits, dropped, torch.float32)
    assert set(lost.unique().tolist()) == {0.0, 1.0}
    sigma = math.sqrt(0.05 * 0.95 / x.numel())
    assert abs(lost.mean().item() - 0.05) < 4 * sigma
    for neighbour in (lost[:, 1:] * lost[:, :-1], lost[1:] * lost[:-1], lost[:, 4:] * lost[:, :-4]):
        assert abs(neighbour.mean().item() - 0.05**2) < 5 * 0.05 / math.sqrt(x.numel())
    torch.manual_seed(5)
    assert torch.equal(draw_bits(x), bits)
    assert not torch.equal(draw_bits(x), bits)


def test_the_expectation_is_kept():
    """Over noise, the output is that without any: what is kept is scaled up."""
    layer, x = lora_layer(0.3, True), torch.randn(1, 24)
    mean = layer(x.expand(20_000, 24)).mean(0)
    assert torch.allclose(mean, layer.eval()(x)[0], atol=0.15)
