"""The balance loss: its value, its gradient, and its weight in every kind of training loop."""

import copy
import os
import warnings
from collections import namedtuple
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from mola import MolaConfig, MolaError, MolaLinear
from mola.architecture.layer_stacks import LayerStacks
from mola.tuner.counted_tokens import CountedTokens
from mola.tuner.log_prob_loss import LikelihoodCheck, add_loss_to_log_probs
from mola.tuner.router_statistics import RouterOutput, balance_loss, pool, router_statistics, z_loss

from ..grids import slow
from ..versions import needs
from ..waiting import PATIENCE
from .counting import CountOperators
from .models import clone, random_config, tiny_llama, token_batch

COEF = 0.5  # large, so that a wrong weight shows


def make(**options):
    options = {"router_aux_loss_coef": COEF, **options}
    torch.manual_seed(3)
    return get_peft_model(tiny_llama(), random_config(**options)).train()


def routers(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def reference_terms(model, batch, counted):
    """Per router: (logits, choices) of the counted tokens, recomputed from each module's input."""
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, _: seen.append((m, args[0].detach()))) for module in routers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    terms = []
    for module, x in seen:
        if "default" not in module.mola_router:  # one expert
            continue
        x = x[counted]
        logits = x @ module.mola_router["default"].t()
        terms.append((module, logits))
    return terms


def reference_balance(logits, top_k):
    num_experts = logits.shape[-1]
    p = logits.softmax(-1)
    chosen = logits.topk(top_k).indices
    share = torch.stack([(chosen == e).sum() for e in range(num_experts)]) / chosen.numel()
    return num_experts * (share * p.mean(0)).sum()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (ours[name] - gradient).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("options", [{"top_k": 1}, {"num_experts": 4, "top_k": [1, 2, 3, 4]}], ids=str)
@pytest.mark.parametrize(("padding", "prompt"), [(0, 0), (4, 3)])
def test_module_reduction_counts_only_positions_with_a_label(options, padding, prompt):
    model = make(**options)
    batch = token_batch(padding=padding, prompt=prompt)
    model(**batch)
    labels = batch["labels"]
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    counted &= batch["attention_mask"].bool()
    expected = [
        reference_balance(logits, module.top_k["default"]) for module, logits in reference_terms(model, batch, counted)
    ]
    model(**batch)
    torch.testing.assert_close(model.get_balance_loss(), torch.stack(expected).mean())


def test_layer_reduction_pools_and_sums_and_counts_padding():
    model = make(num_experts=[1, 2, 3, 4], top_k=[1, 2, 2, 2], router_aux_loss_reduction="layer")
    batch = token_batch(padding=4)
    everything = torch.ones_like(batch["labels"], dtype=torch.bool)
    pooled = {}
    seen = [module for module in routers(model) if module.num_experts["default"] > 1]
    inputs = {}
    for module in seen:
        module.register_forward_hook(lambda m, args, _: inputs.update({m: args[0].detach()}))
    model(**batch)
    for module, x in inputs.items():
        logits = x[everything] @ module.mola_router["default"].t()
        pooled.setdefault(module.layer_index, []).append(logits)
    expected = 1.0 + sum(reference_balance(torch.cat(logits), 2) for logits in pooled.values())
    torch.testing.assert_close(model.get_balance_loss(), expected)


@torch.no_grad()
def loss_in_evaluation(model, batch):
    return model.eval()(**batch).loss


def test_z_loss():
    model = make(router_aux_loss_coef=0.0, router_z_loss_coef=COEF)
    batch = token_batch()
    counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted[:, :-1] = True
    with_loss = model(**batch).loss
    z = [logits.logsumexp(-1).square().mean() for _, logits in reference_terms(model, batch, counted)]
    plain = loss_in_evaluation(model, batch)
    torch.testing.assert_close(with_loss - plain, COEF * torch.stack(z).mean())


def test_a_loss_that_lowers_some_likelihoods_is_refused():
    """Log-probabilities as TRL's trainers take them from a model: one loss is a likelihood, one like DPO's."""
    mask = torch.tensor([[True, True, False]])
    for signs, fails in (([[-1.0, -3.0, 5.0]], False), ([[-1.0, 2.0, 0.0]], True)):
        log_probs, extra = torch.zeros(1, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        total = (add_loss_to_log_probs(log_probs, extra, mask, LikelihoodCheck()) * torch.tensor(signs)).sum()
        if fails:
            with pytest.raises(MolaError, match="must be 0 if the trainer's loss is not a mean"):
                total.backward()
        else:
            total.backward()
            assert log_probs.grad.tolist() == signs
            assert extra.grad == 4.0  # the weight of the real tokens


def test_routers_of_equal_shape_are_one_stack():
    """On a GPU every operator is a launch: there must not be dozens for each router."""
    counted = []
    for num_layers in (2, 4):
        config = random_config(num_experts=4, router_aux_loss_coef=COEF, router_z_loss_coef=COEF)
        model = get_peft_model(tiny_llama(num_layers=num_layers), config).train()
        model(**token_batch())
        with CountOperators() as operators:
            model.get_balance_loss()
        counted.append(operators.operators)
        assert operators.syncs == []
    # Logits are views that have to be taken of each router.
    assert counted[1] - counted[0] <= 2 * 14
    assert counted[0] <= 40 + 2 * 14


class Event:
    """Like a CUDA event that has finished when `done` is set."""

    done = False

    def query(self):
        return self.done


def test_on_a_gpu_such_a_loss_is_refused_later():
    check, event = LikelihoodCheck(), Event()
    check._pending = [(torch.tensor(False), event), (torch.tensor(True), event)]
    check.raise_if_violated()
    assert copy.deepcopy(check)._pending == []
    event.done = True
    with pytest.raises(MolaError, match="must be 0 if the trainer's loss is not a mean"):
        check.raise_if_violated()
    assert check._pending == []


def test_losses_of_two_active_adapters_are_added():
    model = make()
    model.add_adapter("second", random_config(router_aux_loss_coef=2 * COEF))
    model.base_model.set_adapter(["default", "second"])
    batch = token_batch()
    with_losses = model(**batch).loss
    expected = COEF * model.get_balance_loss("default") + 2 * COEF * model.get_balance_loss("second")
    for config in model.peft_config.values():
        config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(with_losses - model(**batch).loss, expected)


def test_labels_that_are_shifted_already_say_which_tokens_count():
    """As trainers give them that split sequences over devices; where they are beside labels, labels count."""
    model, batch = make(), token_batch(prompt=3)
    labels = batch["labels"]
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    model(**batch)
    expected = model.get_balance_loss()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], shift_labels=shifted, labels=labels)
    torch.testing.assert_close(model.get_balance_loss(), expected)
    tokens = CountedTokens(model, LayerStacks(num_layers=4))
    tokens.read({"shift_labels": shifted}, {None})
    assert torch.equal(tokens.mask(shifted.numel(), 0, runs=1), (shifted != -100).flatten())


def test_bare_model_with_an_injected_adapter():
    model = make()
    batch = token_batch(padding=3)
    expected = model(**batch).loss
    torch.manual_seed(3)
    bare = inject_adapter_in_model(random_config(router_aux_loss_coef=COEF), tiny_llama()).train()
    torch.testing.assert_close(bare(**batch).loss, expected)


# ---------------------------------------------------------------------- gradient checkpointing


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    batch = token_batch(padding=2)
    model = make()
    model(**batch).loss.backward()
    expected = gradients(model)
    again = make()
    again.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    again(**batch).loss.backward()
    assert_same_gradients(gradients(again), expected)
    # What the recomputation left behind must not reach the next forward pass.
    plain = loss_in_evaluation(again, batch)
    torch.testing.assert_close(plain, loss_in_evaluation(model, batch))


def test_reentrant_checkpointing_is_refused():
    model = make()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(MolaError, match="use_reentrant"):
        model(**token_batch())


def copy_as_data_parallel_does(model):
    """As `torch.nn.parallel.replicate` makes it on each GPU: without parameters, but with tensors in their place."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    return copies[model]


@pytest.mark.parametrize("num_experts", [1, 3])
def test_copies_of_data_parallel_compute_the_same(num_experts):
    model, batch = make(router_aux_loss_coef=0.0, num_experts=num_experts), token_batch()
    expected = model(**batch).loss
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = copy_as_data_parallel_does(model)(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert_same_gradients(gradients(model), wanted)


def test_frozen_lower_layers_are_no_checkpointing():
    """Nothing below their routers is trained, so that their logits need no gradient."""
    model, batch = make(), token_batch()
    for module in routers(model):
        if module.layer_index == 0:
            module.requires_grad_(False)
    model(**batch).loss.backward()
    trained = [router for module in routers(model) for router in module.mola_router.values() if router.requires_grad]
    assert trained
    assert all(router.grad is not None for router in trained)


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_labels_of_masked_language_models_are_not_shifted(task_type):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertForMaskedLM(BertConfig(vocab_size=50, **size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    config = random_config(router_aux_loss_coef=COEF, target_modules=["query", "value"], task_type=task_type)
    model = get_peft_model(base, config).train()
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, 0] = labels[:, 3] = 7
    model(input_ids=ids, labels=labels)
    found = model.get_balance_loss()
    terms = reference_terms(model.eval(), {"input_ids": ids}, labels != -100)
    expected = [reference_balance(logits, module.top_k["default"]) for module, logits in terms]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_router_runs_are_deleted_with_the_adapter():
    model = make()
    (first, *_) = routers(model)
    first.router_calls["default"] = 12
    assert all(module.router_calls == {} for module in routers(copy.deepcopy(model)))
    model.add_adapter("second", random_config(router_aux_loss_coef=COEF))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert "default" not in first.router_calls


def test_data_parallel_is_refused():
    replica = make().base_model.model._replicate_for_data_parallel()
    with pytest.raises(MolaError, match="DataParallel"):
        replica(**token_batch())


# ---------------------------------------------------------------------- trainers


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def rows(batches):
    return [
        {name: value[row].tolist() for name, value in batch.items()}
        for batch in batches
        for row in range(len(batch["labels"]))
    ]


def expected_gradients(model, batches):
    """Sum over micro-batches of (share of the trained tokens) x (task loss + coef x balance loss)."""
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    model.zero_grad()
    for batch, count in zip(batches, tokens, strict=True):
        (model(**batch).loss * count / sum(tokens)).backward()
    return gradients(model)


def micro_batches():
    return [token_batch(rows=2, padding=i, seed=i, prompt=2 * i) for i in range(4)]


def training_arguments(folder, **options):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }


counts_labels = needs("transformers", "5.10", "its accumulated loss counts a label more that is not trained")


@counts_labels
@pytest.mark.parametrize("checkpointing", [False, *slow(True)])
def test_trainer_with_gradient_accumulation(tmp_path, checkpointing):
    batches = micro_batches()
    keep = KeepGradients()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = Trainer(
        model=make(),
        args=TrainingArguments(**training_arguments(tmp_path, **(options if checkpointing else {}))),
        train_dataset=rows(batches),
        callbacks=[keep],
    )
    trainer.train()
    assert_same_gradients(keep.steps[0], expected_gradients(make(), batches))


@counts_labels
def test_trl_sft_trainer(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl", reason="needs the extra 'trl': pip install mola-peft[trl]")
    datasets = pytest.importorskip("datasets")
    batches = micro_batches()
    keep = KeepGradients()
    trainer = trl.SFTTrainer(
        model=make(),
        args=trl.SFTConfig(
            **training_arguments(tmp_path),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            remove_unused_columns=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows(batches)),
        data_collator=stack,
        processing_class=tiny_tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    assert_same_gradients(keep.steps[0], expected_gradients(make(), batches), tolerance=1e-4)


def stack(features):
    return {
        name: torch.tensor([feature[name] for feature in features])
        for name in ("input_ids", "attention_mask", "labels")
    }


def ddp_worker(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    keep = KeepGradients()
    options = training_arguments(folder, gradient_accumulation_steps=2, ddp_find_unused_parameters=False)
    trainer = Trainer(
        model=make(num_experts=4, top_k=1),
        args=TrainingArguments(**options),
        train_dataset=rows(micro_batches()),
        callbacks=[keep],
    )
    trainer.train()
    if rank == 0:
        torch.save({name.removeprefix("module."): g for name, g in keep.steps[0].items()}, f"{folder}/gradients.pt")
    dist.barrier()  # or one may wait for ever for the other, which has gone
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    ours = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert_same_gradients(ours, expected_gradients(make(num_experts=4, top_k=1), micro_batches()))


def test_the_losses_need_no_host_sync():
    counts = []
    for coefficient in (0.0, COEF):
        model = make(router_aux_loss_coef=coefficient)
        batch = {**token_batch(padding=2), "num_items_in_batch": torch.tensor(20)}
        model(**batch)  # masks of the attention are prepared on the first call
        with CountOperators() as counter:
            model(**batch).loss.backward()
        counts.append(counter.syncs)
    assert counts[1] == counts[0]  # the base model's own, if any


# ---------------------------------------------------------------------- warnings


def test_top_k_one_without_a_balance_loss_warns_once():
    model, model_without_routers = (make(top_k=1, num_experts=n, router_aux_loss_coef=0.0) for n in ("1211", "1111"))
    with pytest.warns(UserWarning, match="top_k=1"):
        model(**token_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**token_batch())
        model_without_routers(**token_batch())


def test_a_model_that_returns_no_loss_warns_once():
    model = make()
    batch = token_batch()
    labels = batch.pop("labels")
    with pytest.warns(UserWarning, match="get_router_loss"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
    assert model.get_balance_loss().requires_grad
    assert labels is not None


def test_get_router_loss_is_all_that_is_added_to_the_models_loss():
    model = make(router_z_loss_coef=0.5)
    batch = token_batch()
    whole = model(**batch).loss
    weighted = model.get_router_loss()
    assert weighted > COEF * model.get_balance_loss()
    with torch.no_grad():
        task_loss = loss_in_evaluation(model, batch)
    torch.testing.assert_close(task_loss + weighted, whole)


def test_router_losses_before_any_forward():
    for ask in (make().get_balance_loss, make().get_router_loss):
        with pytest.raises(MolaError, match="forward pass in training mode"):
            ask()


def test_router_loss_without_the_adapters_of_the_forward_pass_is_an_error():
    """The unweighted balance loss would be a wrong answer."""
    model = make()
    model(**token_batch())
    with model.disable_adapter(), pytest.raises(MolaError, match="same active adapters"):
        model.get_router_loss()


@pytest.mark.parametrize("jitter", [0.0, 0.1])  # the fused computation, and the one in plain operators
def test_nothing_is_recorded_without_a_router_loss(jitter):
    model = make(router_aux_loss_coef=0.0, router_jitter_noise=jitter)
    model(**token_batch())
    assert not any(module.router_outputs for module in routers(model))


def test_nothing_is_recorded_outside_the_models_forward():
    model = make()
    model(**token_batch())
    assert all(module.router_outputs for module in routers(model))
    for module in routers(model):
        module.router_outputs = {}
        module(torch.randn(3, module.in_features))
    assert not any(module.router_outputs for module in routers(model))


@pytest.mark.parametrize("counted", [0, 1])
def test_batches_in_which_hardly_a_token_counts(counted):
    logits, mask = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]), torch.zeros(2)
    mask[:counted] = 1
    statistics = router_statistics(RouterOutput(logits, logits.topk(1).indices), mask)
    expected = 3 * logits[0].softmax(0)[1] if counted else torch.tensor(0.0)
    torch.testing.assert_close(balance_loss(statistics), expected)
    torch.testing.assert_close(z_loss(statistics), logits[:counted].logsumexp(1).square().sum())


@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_stay_on_the_device_of_the_logits(masked):
    """On a device that is neither the CPU nor a GPU: anything made elsewhere would not fit."""
    logits = torch.empty(6, 3, device="meta", requires_grad=True)
    output = RouterOutput(logits, torch.empty(6, 2, dtype=torch.long, device="meta"))
    statistics = router_statistics(output, torch.ones(6, device="meta") if masked else None)
    for loss in (balance_loss(pool([statistics, statistics])), z_loss(statistics)):
        assert loss.device == logits.device
        loss.backward()


def test_hooks_are_installed_once_for_several_adapters():
    model = make()
    model.add_adapter("second", random_config(router_aux_loss_coef=1.0))
    inner = model.base_model.model
    assert len(inner._forward_hooks) == 1
    batch = token_batch()
    first = model(**batch).loss
    model.set_adapter("second")
    second = model(**batch).loss
    assert not torch.equal(first, second)
    torch.testing.assert_close(second - loss_in_evaluation(model, batch), clone_balance(model, batch))


def clone_balance(model, batch):
    again = clone(model).train()
    again(**batch)
    return again.get_balance_loss("second")


def test_a_model_can_be_copied_between_forward_and_backward():
    model = make()
    batch = token_batch()
    loss = model(**batch).loss
    again = clone(model)
    torch.testing.assert_close(again(**batch).loss, loss)
    assert routers(again)[0].router_losses is not routers(model)[0].router_losses


def test_a_base_in_evaluation_mode_warns_once():
    """As `from_pretrained` leaves it, while new layers say that they train."""
    model = make()
    model.base_model.model.eval()
    assert model.training
    batch = token_batch()
    with pytest.warns(UserWarning, match=r"in evaluation mode, so the losses of its routers are left out.*train\(\)"):
        model(**batch)
    model(**batch)
    for name, parameter in (plain := make(router_aux_loss_coef=0.0)).named_parameters():
        parameter.requires_grad_("router" in name)
    plain.eval()(**batch)  # has no losses to leave out


@pytest.mark.parametrize("training", [True, False])
def test_routers_in_half_precision_warn_once(training):
    model, batch = make(router_aux_loss_coef=0.0).train(training), token_batch()
    with warnings.catch_warnings(), torch.set_grad_enabled(training):
        warnings.simplefilter("error", UserWarning)
        model(**batch)
        model.to(torch.bfloat16)
        with pytest.warns(UserWarning, match="The routers of adapter 'default' are in torch.bfloat16"):
            model(**batch)
        model(**batch)


def test_layer_reduction_pools_routers_with_as_many_experts():
    model = make(
        num_experts="8,", num_experts_pattern={"self_attn.*": 2, "mlp.gate_proj": 1}, router_aux_loss_reduction="layer"
    )
    batch = token_batch()
    everything = torch.ones_like(batch["attention_mask"], dtype=torch.bool)
    sums = {}
    for module, logits in reference_terms(model, batch, everything):
        sums.setdefault((module.layer_index, logits.shape[-1]), []).append(logits)
    # Each layer: four routers of 2 experts, two of 8; it has routers, so its linear with one expert adds nothing.
    assert [len(each) for each in sums.values()] == [4, 2] * 4
    expected = sum(
        balance_loss(pool([router_statistics(RouterOutput(x, x.topk(2).indices)) for x in each]))
        for each in sums.values()
    )
    model(**batch)
    torch.testing.assert_close(model.get_balance_loss(), expected)


def test_a_module_that_runs_several_times_counts_every_time():
    """As the one layer of ALBERT: all calls together are what the loss is of, without the padding in each."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.shared, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)

        def forward(self, input_ids, attention_mask=None, labels=None):
            hidden = self.shared(self.shared(self.embed(input_ids)).tanh())
            logits = self.head(hidden)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    torch.manual_seed(0)
    config = MolaConfig(num_experts=4, target_modules=["shared"], router_aux_loss_coef=COEF, init_lora_weights=False)
    model = get_peft_model(Twice(), config).train()
    inputs = []
    (layer,) = routers(model)
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids)
    inputs.clear()  # of every pass anew
    output = model(input_ids=ids, attention_mask=mask, labels=ids)
    counted = mask.bool()
    counted[:, -1] = False  # the last position predicts nothing
    logits = torch.cat([x[counted] for x in inputs]) @ layer.mola_router["default"].t()
    torch.testing.assert_close(model.get_balance_loss(), reference_balance(logits, 2))
    task_loss = nn.functional.cross_entropy(output["logits"].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(output["loss"], task_loss + COEF * model.get_balance_loss())


def test_labels_of_another_length_are_no_mask():
    """As of a classifier with several labels: their number divides that of the tokens, and says nothing of these."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lin, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, input_ids, labels=None):
            logits = self.head(self.lin(self.embed(input_ids)).mean(1))
            return {"loss": (logits - labels).square().mean(), "logits": logits}

    torch.manual_seed(0)
    config = MolaConfig(num_experts=4, target_modules=["lin"], router_aux_loss_coef=COEF, init_lora_weights=False)
    model, inputs = get_peft_model(Classifier(), config).train(), []
    (layer,) = routers(model)
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    model(input_ids=torch.arange(16).view(2, 8), labels=torch.ones(2, 4))
    logits = inputs[0].flatten(0, 1) @ layer.mola_router["default"].t()
    torch.testing.assert_close(model.get_balance_loss(), reference_balance(logits, 2))


def test_positional_arguments_are_read():
    model, batch = make(), token_batch(padding=3)
    positional = model.base_model.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(positional.loss, model(**batch).loss)


@pytest.mark.parametrize("kind", ["dict", "tuple", "named tuple"])
def test_losses_are_added_to_any_output_that_has_a_loss(kind):
    Named = namedtuple("Named", ["loss", "logits"])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x, labels=None):
            logits = self.lin(x)
            output = {"loss": (logits - labels).square().mean(), "logits": logits}
            return {"dict": output, "tuple": tuple(output.values()), "named tuple": Named(**output)}[kind]

    torch.manual_seed(0)
    config = MolaConfig(num_experts=4, target_modules=["lin"], router_aux_loss_coef=COEF, init_lora_weights=False)
    model = get_peft_model(Model(), config).train()
    x, labels = torch.randn(2, 3, 8)
    output = model(x, labels=labels)
    loss, logits = output.values() if kind == "dict" else output
    torch.testing.assert_close(loss, (logits - labels).square().mean() + COEF * model.get_balance_loss())
