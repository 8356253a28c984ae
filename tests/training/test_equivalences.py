"""What must make no difference: how an update is cut into micro-batches, padding, checkpointing, stopping, processes.

Gradients of all LoRA matrices are compared, with B away from its initial 0, where A would have none.
"""

import dataclasses
import math
import signal
from collections.abc import Callable, Sequence

import pytest
import torch

from harness.parts import Parts, build, run_train
from medqa.data.batches import MicroBatch, Stream, collate
from medqa.errors import Interrupted
from medqa.model.base import adapter_weights, load_adapter_weights
from medqa.model.loss import target_count, token_losses
from medqa.training.checkpoint import checkpoints, newest_valid, save_adapter, save_checkpoint
from medqa.training.loop import StepResult
from medqa.training.run import load_into
from medqa.training.state import Progress
from medqa.training.stopping import Stopper

GRADIENTS_WITHIN = 1e-5  # of the largest value in the tensor, in float32 (1e-6 was measured)
LOSSES_WITHIN = 1e-6  # relative
UPDATE_ROWS = 8

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small(tiny) -> Callable[..., Parts]:
    """The parts of an experiment with updates of 8 rows, B matrices small but not 0."""

    def make(name: str, *sets: str) -> Parts:
        experiment = tiny(
            name,
            f"training.global_batch_size={UPDATE_ROWS}",
            "training.per_device_batch_size=4",
            "tokenization.max_length=96",
            *sets,
        )
        parts = build(experiment)
        move_b(parts)
        return parts

    return make


@pytest.fixture(scope="module", params=["4bit", "none"])
def without_dropout(request, small) -> Parts:
    return small("exp_001", "lora.lora_dropout=0.0", f"model.quantization={request.param}")


def lora(parts: Parts) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in parts.adapted.named_parameters() if p.requires_grad}


def move_b(parts: Parts) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora(parts).items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def gradients_of(parts: Parts, micro_batches: Sequence[MicroBatch]) -> tuple[Gradients, StepResult]:
    """The unclipped gradient of one `train_step`, after which the weights are put back."""
    before = {name: p.detach().clone() for name, p in lora(parts).items()}
    result = parts.step(micro_batches, max_grad_norm=1e9)
    gradients = {name: p.grad.clone() for name, p in lora(parts).items()}
    with torch.no_grad():
        for name, parameter in lora(parts).items():
            parameter.copy_(before[name])
    assert len(gradients) == 28
    assert all(gradient.any() for gradient in gradients.values())
    return gradients, result


def assert_close(ours: tuple[Gradients, StepResult], theirs: tuple[Gradients, StepResult]) -> None:
    assert ours[1].loss == pytest.approx(theirs[1].loss, rel=LOSSES_WITHIN)
    assert ours[1].grad_norm == pytest.approx(theirs[1].grad_norm, rel=GRADIENTS_WITHIN)
    for name, gradient in theirs[0].items():
        assert (ours[0][name] - gradient).abs().max() <= GRADIENTS_WITHIN * gradient.abs().max(), name


def assert_equal(ours: tuple[Gradients, StepResult], theirs: tuple[Gradients, StepResult]) -> None:
    """Bit for bit."""
    assert (ours[1].loss, ours[1].grad_norm) == (theirs[1].loss, theirs[1].grad_norm)
    assert all(torch.equal(ours[0][name], gradient) for name, gradient in theirs[0].items())


def cut(parts: Parts, size: int, padding: str = "longest", update: int = 0) -> list[MicroBatch]:
    """An update's rows in micro-batches of `size`."""
    tokenization = parts.experiment.tokenization.model_copy(update={"padding": padding})
    return parts.stream.micro_batches(update, size, tokenization, parts.tokenizer.pad_token_id)


# --- how an update is cut


@pytest.mark.parametrize("size", [8, 2, 1])
def test_the_cut_into_micro_batches_makes_no_difference(without_dropout, size):
    micro_batches = cut(without_dropout, size)
    assert len(micro_batches) == UPDATE_ROWS // size
    counts = {target_count(m) / len(m.row_ids) for m in cut(without_dropout, 1)}
    assert max(counts) > 1.2 * min(counts)  # rows of different lengths, or a mean of means would pass
    assert_close(gradients_of(without_dropout, micro_batches), gradients_of(without_dropout, cut(without_dropout, 4)))


def test_an_equivalence_can_fail(without_dropout):
    """The same comparison with one row left out."""
    with pytest.raises(AssertionError):
        assert_close(
            gradients_of(without_dropout, cut(without_dropout, 1)[:-1]),
            gradients_of(without_dropout, cut(without_dropout, 4)),
        )


# --- padding


@pytest.mark.parametrize("size", [1, 2])
def test_padding_makes_no_difference(without_dropout, size):
    longest, to_maximum = cut(without_dropout, size, "longest"), cut(without_dropout, size, "max_length")
    assert {m.input_ids.shape[1] for m in to_maximum} == {96}
    assert any(m.input_ids.shape[1] < 96 for m in longest)
    assert_close(gradients_of(without_dropout, longest), gradients_of(without_dropout, to_maximum))


def test_what_stands_in_the_padding_makes_no_difference(without_dropout):
    expected = gradients_of(without_dropout, cut(without_dropout, 4, "max_length"))
    other = cut(without_dropout, 4, "max_length")
    for micro_batch in other:
        micro_batch.input_ids[micro_batch.attention_mask == 0] = 17
    assert_close(gradients_of(without_dropout, other), expected)


# --- gradient checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_checkpointing_makes_no_difference(small, dropout):
    """With dropout the second forward must draw the first one's noise."""
    results = []
    for on in ("true", "false"):
        parts = small("exp_003", f"model.gradient_checkpointing={on}", f"lora.lora_dropout={dropout}")
        assert parts.base.is_gradient_checkpointing == (on == "true")
        results.append(gradients_of(parts, cut(parts, 4)))
    assert_equal(*results)


# --- evaluation


def test_gradients_after_an_evaluation_are_those_before(without_dropout):
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and gradients are wrong from then on."""
    before = gradients_of(without_dropout, cut(without_dropout, 4))
    evaluate(without_dropout)
    assert_equal(gradients_of(without_dropout, cut(without_dropout, 4)), before)


def evaluate(parts: Parts, most_tokens: int = 1024, padding_free: bool | None = None):
    return parts.evaluator(most_tokens, padding_free).measure(parts.examples["validation"])


def test_evaluation_does_not_depend_on_batch_size_or_padding(without_dropout):
    reference = evaluate(without_dropout, 1)
    for most_tokens, padding_free in [(300, True), (10_000, True), (1, False), (300, False), (10_000, False)]:
        result = evaluate(without_dropout, most_tokens, padding_free)
        assert (result.tokens, result.rows) == (reference.tokens, reference.rows)
        assert result.loss == pytest.approx(reference.loss, rel=LOSSES_WITHIN)
        assert result.answer_loss == pytest.approx(reference.answer_loss, rel=LOSSES_WITHIN)
        for source, loss in reference.sources.items():
            assert result.sources[source] == pytest.approx(loss, rel=LOSSES_WITHIN)


def test_evaluation_is_the_sum_over_fully_padded_rows_too(without_dropout):
    """By hand, one row at a time, each padded to the maximum; and a mean of row means would be something else."""
    parts, examples = without_dropout, without_dropout.examples["validation"]
    tokenization = parts.experiment.tokenization.model_copy(update={"padding": "max_length"})
    parts.model.eval()
    sums, counts = [], []
    with torch.no_grad():
        for example in examples:
            micro_batch = collate([example], tokenization, parts.tokenizer.pad_token_id)
            sums.append(token_losses(parts.model, micro_batch, parts.accelerator.device).double().sum().item())
            counts.append(target_count(micro_batch))
    loss = evaluate(parts).loss
    assert loss == pytest.approx(math.fsum(sums) / sum(counts), rel=LOSSES_WITHIN)
    mean_of_means = math.fsum(s / c for s, c in zip(sums, counts, strict=True)) / len(examples)
    assert loss != pytest.approx(mean_of_means, rel=100 * LOSSES_WITHIN)


# --- stop and continue

CONTINUED = {
    "AdamW in float32": ("exp_001", "model.quantization=none"),
    "4-bit, paged 8-bit AdamW": ("exp_002", "model.quantization=4bit"),
    "4-bit, checkpointing, [PAD]": ("exp_003", "model.quantization=4bit"),
    "no padding, 4-bit expanded, paged 8-bit AdamW": ("exp_002", "training.padding_free=true", "model.dequantize=auto"),
}


def assert_same_state(ours, theirs) -> None:
    """State dicts, tensors in them bit for bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_state(a, b)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("recipe", CONTINUED.values(), ids=CONTINUED)
def test_continued_is_uninterrupted_bit_for_bit(tiny, tmp_path, recipe):
    name = recipe[0]
    experiment = tiny(*recipe, "training.max_steps=6", "training.global_batch_size=8", "tokenization.max_length=64")
    assert experiment.lora.lora_dropout == 0.05
    straight = build(experiment)
    straight_records = run_train(straight, Progress(), directory(tmp_path, "straight"))

    first, stopper = build(experiment), Stopper()
    place = directory(tmp_path, "continued")

    def signal_in_the_third_update(record: dict) -> None:
        stopper.received = signal.SIGTERM if record["step"] == 3 else None

    with pytest.raises(Interrupted):
        run_train(
            first,
            Progress(),
            place,
            save=lambda: save_checkpoint(place, first.state, first.identity, first.accelerator, 3, pytest.fail),
            stopper=stopper,
            told=signal_in_the_third_update,
        )
    assert [path.name for path in checkpoints(place)] == ["checkpoint-3"]

    torch.manual_seed(987654321)  # no random state is carried along, so none may matter
    second = build(experiment)
    move_b(second)
    torch.rand(17)
    found = newest_valid([place])
    load_into(second.state, found, second.identity)
    state = second.state.progress
    assert not state.not_bitwise
    assert state.step == 3
    records = run_train(second, state, place)

    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_seen", "examples_seen", "epoch")
    assert [[r[k] for k in kept] for r in records] == [[r[k] for k in kept] for r in straight_records]
    assert_same_state(adapter_weights(second.adapted), adapter_weights(straight.adapted))
    assert_same_state(second.optimizer.state_dict(), straight.optimizer.state_dict())
    assert_same_state(second.scheduler.state_dict(), straight.scheduler.state_dict())
    types = {t.dtype for s in second.optimizer.state.values() for t in s.values() if torch.is_tensor(t)}
    assert (torch.uint8 in types) == (name == "exp_002")


def directory(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


# --- noise


@pytest.fixture(scope="module")
def with_dropout(small) -> Parts:
    parts = small("exp_001")
    assert parts.experiment.lora.lora_dropout == 0.05
    return parts


def test_noise_follows_from_the_position_alone(with_dropout):
    micro_batches = cut(with_dropout, 4)
    torch.manual_seed(1)
    expected = gradients_of(with_dropout, micro_batches)
    torch.manual_seed(2)
    torch.rand(1000)
    assert_equal(gradients_of(with_dropout, micro_batches), expected)


def test_another_position_has_other_noise(with_dropout):
    micro_batch = cut(with_dropout, 4)[0]
    moved = dataclasses.replace(micro_batch, position=micro_batch.position + 4)
    here, there = gradients_of(with_dropout, [micro_batch]), gradients_of(with_dropout, [moved])
    assert here[1].loss != pytest.approx(there[1].loss, rel=1e-5)
    assert_equal(gradients_of(with_dropout, [micro_batch]), here)


def test_another_seed_has_other_noise(with_dropout):
    micro_batches = cut(with_dropout, 4)
    here = gradients_of(with_dropout, micro_batches)[1].loss
    settings = with_dropout.experiment
    training = settings.training.model_copy(update={"seed": settings.training.seed + 1})
    other = dataclasses.replace(with_dropout, experiment=settings.model_copy(update={"training": training}))
    assert here != pytest.approx(gradients_of(other, micro_batches)[1].loss, rel=1e-5)


def test_noise_does_not_depend_on_the_micro_batches_before(with_dropout):
    """So that another process, which has other ones before it, draws the same. Losses add up, token by token."""
    micro_batches = cut(with_dropout, 4)
    together = gradients_of(with_dropout, micro_batches)[1]
    alone = [gradients_of(with_dropout, [m])[1].loss * target_count(m) for m in micro_batches]
    targets = sum(target_count(m) for m in micro_batches)
    assert together.loss == pytest.approx(sum(alone) / targets, rel=LOSSES_WITHIN)
    backwards = gradients_of(with_dropout, micro_batches[::-1])[1]
    assert backwards.loss == pytest.approx(together.loss, rel=LOSSES_WITHIN)


def test_evaluation_has_no_noise(with_dropout):
    torch.manual_seed(1)
    first = evaluate(with_dropout).loss
    torch.manual_seed(2)
    assert evaluate(with_dropout).loss == first
    assert with_dropout.model.training  # as it was


# --- processes


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_out_the_same_micro_batches(with_dropout, processes):
    """In an update in the middle of the data and in one that runs across the end of an epoch."""
    parts = with_dropout
    stream = Stream(parts.examples["train"], parts.stream.seed, 32)
    tokenization, pad = parts.experiment.tokenization, parts.tokenizer.pad_token_id
    last_of_epoch = len(stream.examples) // 32
    assert last_of_epoch * 32 < len(stream.examples) < (last_of_epoch + 1) * 32
    for update in (1, last_of_epoch):
        one = stream.micro_batches(update, 4, tokenization, pad)
        shares = [stream.micro_batches(update, 4, tokenization, pad, i, processes) for i in range(processes)]
        assert {len(share) for share in shares} == {len(one) // processes}
        shared_out = sorted((m for share in shares for m in share), key=lambda m: m.position)
        assert (
            [m.position for m in shared_out]
            == [m.position for m in one]
            == list(range(update * 32, update * 32 + 32, 4))
        )
        for a, b in zip(shared_out, one, strict=True):
            assert a.row_ids == b.row_ids
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)


def test_the_order_of_rows_leaves_its_mark_however_an_update_is_cut(with_dropout):
    parts = with_dropout
    tokenization, pad = parts.experiment.tokenization, parts.tokenizer.pad_token_id

    def mark(update, *cut):
        return sum(m.order for m in parts.stream.micro_batches(update, *cut[:1], tokenization, pad, *cut[1:]))

    assert mark(0, 4) == mark(0, 1) == mark(0, 2) == mark(0, 4, 0, 1, 3) == mark(0, 2, 0, 2) + mark(0, 2, 1, 2)
    assert mark(0, 4) != mark(1, 4)
    micro_batch = parts.stream.micro_batches(0, 4, tokenization, pad)[0]
    swapped = (micro_batch.row_ids[1], micro_batch.row_ids[0], *micro_batch.row_ids[2:])
    assert dataclasses.replace(micro_batch, row_ids=swapped).order != micro_batch.order


def test_an_epoch_has_every_row_once(with_dropout):
    stream = with_dropout.stream
    size = len(stream.examples)
    everything = {example.row.id for example in stream.examples}
    epochs = [[stream.at(p).row.id for p in range(e * size, (e + 1) * size)] for e in (0, 1)]
    assert all(set(epoch) == everything and len(epoch) == size for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [example.row.id for example in stream.examples]


# --- [PAD]


@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_the_frozen_pad_token_changes_no_loss(small, tmp_path, quantization):
    """exp_003's model, one token larger, against the untouched base with the adapter it saved."""
    larger = small("exp_003", f"model.quantization={quantization}")
    larger.step(cut(larger, 4))
    save_adapter(larger.adapted, tmp_path)
    untouched = small("exp_003", f"model.quantization={quantization}", "tokenization.pad_token=eos")
    load_adapter_weights(untouched.adapted, tmp_path, "adapter")

    pad = larger.tokenizer.pad_token_id
    assert (larger.tokenizer.pad_token, pad) == ("[PAD]", 1024)
    assert untouched.tokenizer.pad_token_id == untouched.tokenizer.eos_token_id
    assert larger.base.get_output_embeddings().weight.shape[0] == 1025
    assert untouched.base.get_output_embeddings().weight.shape[0] == 1024

    for padding_free in (True, False):
        ours, theirs = evaluate(larger, padding_free=padding_free), evaluate(untouched, padding_free=padding_free)
        assert ours.loss == pytest.approx(theirs.loss, rel=LOSSES_WITHIN)
    assert_close(
        gradients_of(larger, cut(larger, 4, "max_length")), gradients_of(untouched, cut(untouched, 4, "max_length"))
    )
    micro_batch = cut(larger, 4, "max_length")[0]
    assert (micro_batch.input_ids == pad).any()
    with torch.no_grad():
        logits = larger.adapted(input_ids=micro_batch.input_ids, attention_mask=micro_batch.attention_mask).logits
    assert (logits[..., pad] == -math.inf).all()
    assert logits[..., :pad].isfinite().all()
