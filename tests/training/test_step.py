"""`train_step` and the small things around it, one promise at a time, on the real embedded model."""

import dataclasses
import math
import signal

import pytest
import torch
from accelerate import Accelerator

from harness.parts import Parts, build, run_train
from medqa.config import Tokenization
from medqa.data.batches import IGNORED, MicroBatch, collate
from medqa.data.sources import Row
from medqa.data.tokens import prompt, tokenize
from medqa.errors import Interrupted, TrainingStopped
from medqa.model.base import adapter_weights
from medqa.model.loss import target_count, token_losses
from medqa.training.recorder import read_metrics
from medqa.training.state import Progress, check_adapter_gradients
from medqa.training.stopping import Stopper

PLAIN = ("model.quantization=none", "lora.lora_dropout=0.0", "training.global_batch_size=8")


@pytest.fixture
def parts(tiny) -> Parts:
    return build(tiny("exp_001", *PLAIN))


def lora(parts: Parts, kind: str = "lora_") -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in parts.adapted.named_parameters() if p.requires_grad and kind in name}


def frozen(parts: Parts) -> dict[str, torch.Tensor]:
    """Everything of the model that is not LoRA, quantization state included, copied."""
    return {name: t.clone() for name, t in parts.adapted.state_dict().items() if "lora_" not in name}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit, NaN equal to itself."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(-7.0), theirs[name].nan_to_num(-7.0)) for name in theirs)


# --- token weighting


def by_hand(parts: Parts, micro_batches: list[MicroBatch]) -> tuple[torch.Tensor, int]:
    """The summed loss (with its graph) of every id but each row's first, and their number, row by row, no padding."""
    total, count = torch.zeros(()), 0
    for micro_batch in micro_batches:
        for ids, mask in zip(micro_batch.input_ids, micro_batch.attention_mask, strict=True):
            row = ids[: int(mask.sum())]
            log_probabilities = parts.adapted(input_ids=row[None]).logits[0].log_softmax(-1)
            for place in range(1, len(row)):
                total = total - log_probabilities[place - 1, row[place]]
                count += 1
    return total, count


def skewed(parts: Parts) -> list[MicroBatch]:
    """Micro-batches of one short row, one long one, and three in between."""
    rows = sorted(parts.examples["train"], key=lambda example: len(example.input_ids))
    tokenization, pad = parts.experiment.tokenization, parts.tokenizer.pad_token_id
    cut = [[rows[0]], [rows[-1]], [rows[10], rows[-10], rows[100]]]
    return [collate(chosen, tokenization, pad, position) for position, chosen in enumerate(cut)]


def test_every_token_weighs_the_same(parts):
    micro_batches = skewed(parts)
    counts = [target_count(m) for m in micro_batches]
    assert counts[1] > 2 * counts[0]
    total, count = by_hand(parts, micro_batches)
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in lora(parts).items()}
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm().item()

    result = parts.step(micro_batches, max_grad_norm=1e9)
    assert sum(counts) == count
    assert result.loss == pytest.approx(total.item() / count, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in lora(parts).items():
        largest = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name
    assert any("lora_B" in name and gradient.any() for name, gradient in expected.items())


def test_tokens_and_padding_are_counted(parts):
    micro_batches = skewed(parts)
    result = parts.step(micro_batches)
    lengths = [[int(n) for n in m.attention_mask.sum(1)] for m in micro_batches]
    places = sum(len(row_lengths) * max(row_lengths) for row_lengths in lengths)
    assert result.tokens == sum(n - 1 for row_lengths in lengths for n in row_lengths)
    assert result.padding_share == pytest.approx(1 - sum(map(sum, lengths)) / places)


# --- what moves


@pytest.mark.parametrize("name", ["exp_001", "exp_002", "exp_003"])
def test_lora_moves_and_the_base_does_not(tiny, name):
    """With an evaluation between the updates: it may not change the base either."""
    parts = build(tiny(name, "training.global_batch_size=8", "tokenization.max_length=64", "scheduler.warmup_steps=0"))
    base, start = frozen(parts), adapter_weights(parts.adapted)
    start = {key: tensor.clone() for key, tensor in start.items()}
    assert sum("lora_A" in key for key in start) == sum("lora_B" in key for key in start) == 14
    first = parts.micro_batches(0)
    parts.step(first)
    check_adapter_gradients(parts.model)
    weights = adapter_weights(parts.adapted)
    assert all(weights[key].any() for key in weights if "lora_B" in key)  # they begin at 0
    parts.evaluator().row_losses(parts.examples["validation"][:4])
    parts.step(parts.micro_batches(1))
    weights = adapter_weights(parts.adapted)
    assert all(not torch.equal(weights[key], start[key]) for key in start)
    assert_same(frozen(parts), base)
    assert {p.dtype for p in lora(parts).values()} == {torch.float32}
    assert all(p.grad is None for name, p in parts.adapted.named_parameters() if "lora_" not in name)


def test_an_adapter_matrix_without_gradient_is_noticed(parts):
    with pytest.raises(TrainingStopped, match="no gradient reached 14 adapter matrices"):
        check_adapter_gradients(parts.model)
    parts.step(parts.micro_batches(0))
    check_adapter_gradients(parts.model)
    name, parameter = list(lora(parts, "lora_B").items())[3]
    parameter.grad.zero_()
    with pytest.raises(TrainingStopped, match=r"1 adapter matrices, .*lora_B") as stopped:
        check_adapter_gradients(parts.model)
    assert name in str(stopped.value)


def test_training_checks_that_every_adapter_matrix_trains(parts, tmp_path):
    """A matrix cut off from the loss: what it gets is multiplied by 0."""
    next(iter(lora(parts, "lora_B").values())).register_hook(torch.zeros_like)
    with pytest.raises(TrainingStopped, match="no gradient reached 1 adapter matrices"):
        run_train(parts, Progress(), tmp_path)


# --- not finite


def state_of(parts: Parts) -> tuple:
    weights = {name: p.detach().clone() for name, p in lora(parts).items()}
    moments = {
        f"{i}.{key}": value.clone()
        for i, state in enumerate(parts.optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    return weights, moments, parts.scheduler.last_epoch


def assert_untouched(parts: Parts, before: tuple) -> None:
    weights, moments, steps = state_of(parts)
    assert_same(weights, before[0])
    assert_same(moments, before[1])
    assert steps == before[2]
    assert all(p.grad is None for p in lora(parts).values())


def own_token(micro_batches: list[MicroBatch], which: int, known: set[int]) -> tuple[int, str]:
    """An id, not a known one, that one row of the update alone has, in the micro-batch `which`; and that row's name."""
    rows = [(m.row_ids[i], set(m.input_ids[i].tolist()), w) for w, m in enumerate(micro_batches) for i in range(4)]
    for name, ids, where in rows:
        alone = ids - known.union(*(other for other_name, other, _ in rows if other_name != name))
        if where == which and alone:
            return min(alone), name
    raise AssertionError("no row has an id of its own")


@pytest.mark.parametrize("which, value", [(0, math.nan), (1, math.nan), (1, math.inf)])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(parts, which, value):
    parts.step(parts.micro_batches(0))
    before = state_of(parts)
    micro_batches = parts.micro_batches(1)
    token, row = own_token(micro_batches, which, known=set())
    with torch.no_grad():
        parts.base.get_input_embeddings().weight[token, 0] = value
    with pytest.raises(TrainingStopped, match="the loss is nan") as stopped:
        parts.step(micro_batches)
    assert row in micro_batches[which].row_ids
    rows = ", ".join(micro_batches[which].row_ids)
    assert str(stopped.value) == f"the loss is nan in micro-batch {which + 1} (rows {rows})"
    assert_untouched(parts, before)


def test_training_says_in_which_update_it_stopped(parts, tmp_path):
    first = {i for m in parts.micro_batches(0) for i in m.input_ids.flatten().tolist()}
    token, row = own_token(parts.micro_batches(1), 1, known=first)
    saved, reached = [], []
    with torch.no_grad():
        parts.base.get_input_embeddings().weight[token] = math.nan
    state = Progress()
    with pytest.raises(
        TrainingStopped,
        match=r"^update 2: the loss is nan in micro-batch \d \(rows .*\)$",
    ) as stopped:
        run_train(parts, state, tmp_path, save=lambda: saved.append(1), told=lambda r: reached.append(r["step"]))
    assert row in str(stopped.value)
    assert (state.step, reached, saved) == (1, [1], [])


def blown_up(parts: Parts) -> None:
    """A matrices so large that B's gradient overflows float32 in its norm, while B = 0 keeps the loss as it was."""
    with torch.no_grad():
        for parameter in lora(parts, "lora_A").values():
            parameter.fill_(1e25)


def test_a_gradient_that_is_not_finite_stops_before_anything_moves(parts):
    blown_up(parts)
    before = state_of(parts)
    with pytest.raises(TrainingStopped, match=r"the gradient norm is inf at a loss of \d\.\d+"):
        parts.step(parts.micro_batches(0))
    assert_untouched(parts, before)


# --- the gradient scaler

HIGH_SCALE = 2.0**22  # the embedded model's gradients overflow float16 from 2**20 on
FEW = ("training.global_batch_size=4", "tokenization.max_length=48")  # float16 is slow on a CPU


def fp16(scale: float):
    """A real scaler under real float16 autocast on the CPU, where Accelerate offers none by itself."""

    def make() -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    return make


def scaled_updates(tiny, scale: float, name: str):
    """Two updates from an initial scale: their results and overflows, the weights, and the scale afterwards."""
    parts = build(tiny(name, *FEW, "scheduler.warmup_steps=0"), fp16(scale))
    results, overflows = [], []
    for _ in range(2):
        before = parts.state.progress.overflows
        results.append(parts.update())
        overflows.append(parts.state.progress.overflows - before)
    assert parts.scheduler.last_epoch == 2
    return results, overflows, adapter_weights(parts.adapted), parts.accelerator.scaler.get_scale()


@pytest.mark.parametrize("name", ["exp_001", "exp_002"])
def test_an_overflow_is_the_same_update_once_more_at_half_the_scale(tiny, own_accelerator, name):
    """With dropout, whose noise must be the same in each try; by AdamW and by the 8-bit one, which know no scaler."""
    redone, overflows, weights, scale = scaled_updates(tiny, HIGH_SCALE, name)
    assert overflows[0] >= 2
    assert scale == HIGH_SCALE / 2 ** sum(overflows)  # halved each time
    # As if it had begun at the scale that it found: nothing is left of the tries that overflowed.
    calm, calm_overflows, calm_weights, calm_scale = scaled_updates(tiny, scale, name)
    assert (calm_overflows, calm_scale) == ([0, 0], scale)
    assert redone == calm
    assert_same(weights, calm_weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_overflows_are_counted_over_the_run(tiny, own_accelerator, tmp_path):
    sets = ("model.quantization=none", "training.max_steps=2", *FEW)
    parts, state = build(tiny("exp_001", *sets), fp16(HIGH_SCALE)), Progress()
    run_train(parts, state, tmp_path)
    assert state.overflows >= 2
    assert parts.accelerator.scaler.get_scale() == HIGH_SCALE / 2**state.overflows
    assert [record["overflows"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == state.overflows


@pytest.mark.slow
def test_an_overflow_starts_the_scalers_count_of_good_updates_anew(tiny, own_accelerator):
    parts = build(tiny("exp_001", "model.quantization=none", *FEW), fp16(HIGH_SCALE))
    scaler = parts.accelerator.scaler
    parts.update()
    assert parts.state.progress.overflows > 0
    after_overflow = scaler.state_dict()["_growth_tracker"]
    for _ in range(2):
        parts.update()
    before = parts.state.progress.overflows
    scaler.load_state_dict({**scaler.state_dict(), "scale": HIGH_SCALE})
    parts.update()
    assert parts.state.progress.overflows > before
    assert scaler.state_dict()["_growth_tracker"] == after_overflow


def test_an_overflow_even_without_scale_is_a_fault(tiny, own_accelerator):
    """Large A matrices and a large alpha overflow float16 in B's gradient at any scale; B = 0 keeps the loss finite."""
    parts = build(tiny("exp_001", *PLAIN, *FEW, "lora.lora_alpha=4096"), fp16(4.0))
    with torch.no_grad():
        for parameter in lora(parts, "lora_A").values():
            parameter.fill_(1e3)
    before = state_of(parts)
    with pytest.raises(TrainingStopped, match=r"update 1: the gradient norm is (inf|nan) at a loss of \d\.\d+"):
        parts.update()
    assert_untouched(parts, before)
    assert parts.accelerator.scaler.get_scale() == 1.0  # 4, 2 and 1 were tried; below 1 it does not go


def test_out_of_memory_under_a_scaler_is_done_again(tiny, own_accelerator, tmp_path, monkeypatch):
    sets = ("model.quantization=none", "training.max_steps=2", *FEW)
    parts, state, calls = build(tiny("exp_001", *sets), fp16(2.0**10)), Progress(), []
    clip = parts.accelerator.clip_grad_norm_

    def full_at_first(*arguments):
        calls.append(clip(*arguments))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return calls[-1]

    monkeypatch.setattr(parts.accelerator, "clip_grad_norm_", full_at_first)
    run_train(parts, state, tmp_path)
    assert (state.step, state.micro_batch_rows, len(calls)) == (2, 2, 3)


def test_a_loss_that_is_not_finite_is_no_overflow(tiny, own_accelerator):
    parts = build(tiny("exp_001", *PLAIN, *FEW), fp16(2.0**10))
    before = state_of(parts)
    with torch.no_grad():
        parts.base.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingStopped, match="the loss is nan"):
        parts.step(parts.micro_batches(0))
    assert_untouched(parts, before)


# --- rate and clipping


def rates(tiny, *sets: str) -> list[float]:
    """The rate used in each of 8 updates."""
    parts = build(
        tiny(
            "exp_001",
            "model.quantization=none",
            "training.max_steps=8",
            "training.global_batch_size=1",
            "training.per_device_batch_size=1",
            "optimizer.learning_rate=0.01",
            *sets,
        )
    )
    return [parts.step(parts.micro_batches(update)).learning_rate for update in range(8)]


def test_the_rate_is_constant(tiny):
    assert rates(tiny, "scheduler.name=none") == [0.01] * 8


def test_a_constant_rate_can_be_warmed_up(tiny):
    expected = [0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01]
    assert rates(tiny, "scheduler.name=none", "scheduler.warmup_steps=4") == pytest.approx(expected, rel=1e-12)


def test_the_rate_falls_linearly_after_its_warmup(tiny):
    expected = [0.0, 0.005] + [0.01 * (8 - u) / 6 for u in range(2, 8)]
    assert rates(tiny, "scheduler.name=linear", "scheduler.warmup_steps=2") == pytest.approx(expected, rel=1e-12)


def test_the_rate_follows_half_a_cosine_after_its_warmup(tiny):
    expected = [0.0, 0.005] + [0.01 * 0.5 * (1 + math.cos(math.pi * (u - 2) / 6)) for u in range(2, 8)]
    assert rates(tiny, "scheduler.name=cosine", "scheduler.warmup_steps=2") == pytest.approx(expected, rel=1e-12)


def test_the_rate_reported_is_the_one_used(tiny):
    """The first of the warmup updates uses 0: nothing moves. AdamW's first step moves by the rate: the next ones do."""
    parts = build(tiny("exp_001", *PLAIN, "scheduler.warmup_steps=4"))
    start = {name: p.detach().clone() for name, p in lora(parts).items()}
    assert parts.step(parts.micro_batches(0)).learning_rate == 0.0
    assert_same(dict(lora(parts)), start)
    rate = parts.step(parts.micro_batches(0)).learning_rate
    assert rate == 0.0025
    moved = max((p - start[name]).abs().max().item() for name, p in lora(parts).items())
    assert moved == pytest.approx(rate, rel=1e-3)  # the same gradient twice: a bias-corrected step of exactly the rate


def test_the_norm_is_from_before_clipping_and_the_gradient_from_after(parts):
    norms = {}
    for limit in (1e9, 0.1):
        result = parts.step(parts.micro_batches(0), max_grad_norm=limit)
        applied = torch.stack([p.grad.double().norm() for p in lora(parts).values()]).norm().item()
        norms[limit] = result.grad_norm, applied
        parts = build(parts.experiment)
    assert norms[1e9][0] == pytest.approx(norms[1e9][1], rel=1e-6)
    assert norms[0.1][0] == norms[1e9][0] > 0.5
    assert norms[0.1][1] == pytest.approx(0.1, rel=1e-4)
    assert norms[0.1][1] <= 0.1


def test_gradients_do_not_add_up_over_updates(tiny):
    """At a rate of 0 the same rows give the same gradient after other rows as at first."""
    parts = build(tiny("exp_001", *PLAIN, "optimizer.learning_rate=1e-30"))
    first = parts.step(parts.micro_batches(0))
    parts.step(parts.micro_batches(1))
    assert parts.step(parts.micro_batches(0)).grad_norm == pytest.approx(first.grad_norm, rel=1e-6)


# --- what is a target


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row(f"own:{i}", "own", question, answer, None) for i, (question, answer) in enumerate(pairs)]


def examples_of(parts: Parts, tokenization: Tokenization):
    given = rows(
        ("What causes gout?", "Uric acid crystals in a joint."), ("What is anaemia?", "Too little haemoglobin.")
    )
    return tokenize(given, parts.tokenizer, tokenization)


def test_eos_is_a_target_though_it_is_the_pad_token(parts):
    """Masked by place: what follows the row's end is no target, the EOS that ends it is."""
    tokenization = parts.experiment.tokenization.model_copy(update={"padding": "max_length"})
    eos = parts.tokenizer.eos_token_id
    assert parts.tokenizer.pad_token_id == eos
    micro_batch = collate(examples_of(parts, tokenization), tokenization, eos)
    for ids, labels, mask in zip(micro_batch.input_ids, micro_batch.labels, micro_batch.attention_mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert labels[:length].tolist() == ids[:length].tolist()
        assert labels[length - 1] == eos
        assert (ids[length:] == eos).all()
        assert (labels[length:] == IGNORED).all()
    # The EOS's own loss is there, and nothing after it.
    losses = token_losses(parts.model, micro_batch, parts.accelerator.device)
    for row, mask in zip(losses, micro_batch.attention_mask, strict=True):
        length = int(mask.sum())
        assert row[length - 2] > 0
        assert (row[length - 1 :] == 0).all()


def test_a_row_that_is_cut_has_no_eos(parts):
    eos = parts.tokenizer.eos_token_id
    whole = examples_of(parts, parts.experiment.tokenization)[0]
    assert whole.input_ids[-1] == eos
    assert whole.input_ids[0] == parts.tokenizer.bos_token_id
    assert not whole.truncated
    length = len(whole.input_ids)
    for max_length, truncated in [(length, False), (length - 1, True), (length - 5, True)]:
        tokenization = parts.experiment.tokenization.model_copy(update={"max_length": max_length})
        example = examples_of(parts, tokenization)[0]
        assert example.truncated == truncated
        assert (eos in example.input_ids) != truncated
        assert example.input_ids.tolist() == whole.input_ids[:max_length].tolist()


def test_the_first_id_is_no_target(parts):
    examples = examples_of(parts, parts.experiment.tokenization)
    micro_batch = collate(examples, parts.experiment.tokenization, parts.tokenizer.pad_token_id)
    assert (micro_batch.labels[:, 0] == parts.tokenizer.bos_token_id).all()
    assert target_count(micro_batch) == sum(len(example.input_ids) - 1 for example in examples)
    micro_batch.labels[:, 0] = IGNORED
    assert target_count(micro_batch) == sum(len(example.input_ids) - 1 for example in examples)


def test_only_the_answer_and_its_eos_are_targets_where_asked(parts):
    tokenization = parts.experiment.tokenization.model_copy(update={"loss_on": "answer"})
    examples = examples_of(parts, tokenization)
    micro_batch = collate(examples, tokenization, parts.tokenizer.pad_token_id)
    for example, labels in zip(examples, micro_batch.labels, strict=True):
        targets = labels[labels != IGNORED].tolist()
        assert targets[-1] == parts.tokenizer.eos_token_id
        assert parts.tokenizer.decode(targets[:-1]).strip() == example.row.answer
        before = example.input_ids[: len(example.input_ids) - len(targets)]
        assert parts.tokenizer.decode(before, skip_special_tokens=True) == prompt(example.row.question)

    result = parts.step([micro_batch])
    fresh = build(parts.experiment)
    nll, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        log_probabilities = fresh.adapted(input_ids=ids[None]).logits[0].log_softmax(-1)
        for place in range(example.answer_start, len(ids)):
            nll -= log_probabilities[place - 1, ids[place]].item()
            count += 1
    assert count == target_count(micro_batch)
    assert result.loss == pytest.approx(nll / count, rel=1e-6)
    assert result.tokens == count


@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_without_any_target_moves_nothing(tiny, own_accelerator, scaled):
    """Also once the optimizer has momentum, with weight decay, and with a scaler, which goes on from there."""
    sets = (*PLAIN, *FEW, "optimizer.weight_decay=0.1", "scheduler.name=linear", "training.max_steps=9")
    parts = build(tiny("exp_001", *sets), fp16(2.0**10) if scaled else None)
    for update in range(2):
        parts.step(parts.micro_batches(update))
    parts.optimizer.zero_grad()
    before = state_of(parts)
    without = [dataclasses.replace(m, labels=torch.full_like(m.labels, IGNORED)) for m in parts.micro_batches(2)]
    result = parts.step(without)
    assert (result.loss, result.grad_norm, result.tokens) == (0.0, 0.0, 0)
    weights, moments, updates = state_of(parts)
    assert_same(weights, before[0])
    assert_same(moments, before[1])
    assert updates == before[2] + 1
    parts.step(parts.micro_batches(3))
    assert parts.scheduler.last_epoch == 4


def test_a_run_checks_its_gradients_once(tiny, tmp_path):
    """At its first update with a target; one that goes on has done so, and a straight run would not do so again."""
    parts = build(tiny("exp_001", *PLAIN, "training.max_steps=2"))
    state = Progress(step=1, tokens_seen=7)
    matrix = next(iter(lora(parts, "lora_B").values()))
    hook = matrix.register_hook(torch.zeros_like)
    run_train(parts, state, tmp_path)
    assert state.step == parts.experiment.training.max_steps
    hook.remove()
    matrix.register_hook(torch.zeros_like)
    with pytest.raises(TrainingStopped, match="no gradient reached 1 adapter matrices"):
        run_train(parts, Progress(step=1), tmp_path)


# --- when to stop


def test_the_stopper_says_why_to_stop_and_when_to_save(parts, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("medqa.training.stopping.time.monotonic", lambda: now[0])
    stopper = Stopper()
    with stopper.finishing_updates(save_minutes=1.5):
        for passed, due in ((0, False), (89.9, False), (90, True), (200, True)):
            now[0] = 1000 + passed
            assert stopper.agree(parts.accelerator, 1, 9, last=False) == (None, due)
        stopper.note_save()
        assert stopper.agree(parts.accelerator, 1, 9, last=False) == (None, False)
        stopper.received = signal.SIGTERM
        stop, due = stopper.agree(parts.accelerator, 1, 9, last=False)
        assert (type(stop), stop.signum, due) == (Interrupted, signal.SIGTERM, False)
        stopper.received = None


def test_the_stopper_leaves_time_for_a_save_and_an_update(parts, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("medqa.training.stopping.time.monotonic", lambda: now[0])
    stopper = Stopper()
    with stopper.finishing_updates(save_minutes=None):
        stopper._deadline = 1100.0
        now[0] = 1030.0  # an update of 30 s: another, with a save as long, still fits
        assert stopper.agree(parts.accelerator, 1, 9, last=False) == (None, False)
        now[0] = 1060.0
        stop, _ = stopper.agree(parts.accelerator, 2, 9, last=False)
        assert str(stop) == "stopped before the --stop-after deadline, after update 2 of 9"
        assert stopper.agree(parts.accelerator, 9, 9, last=True)[0] is None  # there is nothing left to stop
