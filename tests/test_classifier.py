"""The Lightning module: its loss, optimiser, schedule, the authors' tricks, and going on after a stop."""

import types

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import zoo
from operators import DecoupledConv2d
from zoo.data import Digits
from zoo.resuming.last_checkpoint import LastCheckpoint
from zoo.resuming.record import read_lightning_checkpoint
from zoo.training.callbacks import WeightedGradients, WeightProjection
from zoo.training.classifier import Classifier
from zoo.training.finite import SkippedSteps, first_bad_layer
from zoo.training.optimisation import learning_rate_factor, orthogonality_penalty

LEARNED = {"name": "tanh_cosine", "radius_mode": "learned", "radius_relative": True}


def make_trainer(folder, *callbacks, max_epochs=1, **arguments):
    arguments = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0} | arguments
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        **arguments,
    )


def fit(folder, *callbacks, seed=0, **settings):
    """Return a classifier after four steps on Digits."""
    L.seed_everything(seed, verbose=False)
    classifier = Classifier(**settings)
    make_trainer(folder, *callbacks).fit(classifier, datamodule=Digits(augment="none"))
    return classifier


def decoupled(classifier):
    return [layer for layer in classifier.modules() if isinstance(layer, DecoupledConv2d)]


def test_the_model_follows_from_the_data(tmp_path):
    spec = fit(tmp_path, operator=LEARNED, architecture_args={"relu": False}).model.spec
    assert (spec.architecture, spec.operator.radius_mode, dict(spec.model_args)) == ("cnn6", "learned", {"relu": False})
    assert (spec.class_names, spec.in_chans, spec.input_size) == (tuple(Digits.class_names), 1, 8)
    assert (spec.mean, spec.std) == ((0.3053,), (0.3760,))


@pytest.mark.parametrize("operator", ["conv", "tanh_cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_lowers_the_loss(tmp_path, operator, optimizer):
    images, labels = next(iter(Digits().evaluation_batches("train")))
    before = fit(tmp_path, operator=operator, optimizer=optimizer, learning_rate=1e-9)
    after = fit(tmp_path, operator=operator, optimizer=optimizer, learning_rate={"sgd": 0.1, "adamw": 3e-3}[optimizer])
    losses = [F.cross_entropy(classifier.model(images), labels).item() for classifier in (before, after)]
    assert losses[1] < 0.9 * losses[0]


def test_the_loss_is_smoothed_cross_entropy_plus_the_penalty(tmp_path):
    classifier = fit(tmp_path, label_smoothing=0.01, orthogonality=0.5)
    batch = next(iter(Digits().evaluation_batches("train")))
    classifier.log = lambda *_, **__: None
    log_probabilities = classifier.model(batch[0]).log_softmax(1)
    targets = F.one_hot(batch[1], 10) * 0.99 + 0.001
    penalty = 0.0
    for layer in decoupled(classifier):
        filters = layer.weight.flatten(1)
        filters = filters / (filters.square().sum(1, keepdim=True) + 1e-4).sqrt()
        penalty += 0.5 * (filters @ filters.T - torch.eye(len(filters))).square().sum()
    expected = -(targets * log_probabilities).sum(1).mean() + 0.5 * penalty
    torch.testing.assert_close(classifier.training_step(batch, 0), expected)
    assert penalty > 1 and orthogonality_penalty(zoo.build("cnn6")) == 0


@pytest.mark.parametrize("decay_decoupled_filters", [True, False])
def test_weight_decay_spares_biases_normalisations_and_radii(tmp_path, decay_decoupled_filters):
    classifier = fit(tmp_path, operator=LEARNED, weight_decay=0.3, decay_decoupled_filters=decay_decoupled_filters)
    decayed, spared = classifier.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    named = {id(parameter): name for name, parameter in classifier.model.named_parameters()}
    names = {named[id(parameter)] for parameter in decayed["params"]}
    filters = {name for name, value in classifier.model.named_parameters() if value.ndim == 4}
    assert names == {"network.fc.weight"} | (filters if decay_decoupled_filters else set())
    assert names | {named[id(parameter)] for parameter in spared["params"]} == set(named.values())
    assert any(name.endswith("magnitude.radius") for name in named.values())


def test_a_learned_radius_and_the_running_norm_are_trained(tmp_path):
    for layer in decoupled(fit(tmp_path, operator=LEARNED)):
        assert layer.magnitude.radius != 1
        assert layer.magnitude.running_norm.steps == 4


def test_the_schedules():
    assert learning_rate_factor(0.05, "cosine", 0.1) == 0.5
    assert learning_rate_factor(0.1, "cosine", 0.1) == 1
    assert learning_rate_factor(0.55, "cosine", 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, "cosine", 0.1) == 0
    assert [learning_rate_factor(p, "step", 0) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [learning_rate_factor(p, "constant", 0.2) for p in (0, 0.1, 0.2, 1)] == [0, 0.5, 1, 1]


def test_the_schedule_moves_with_the_steps(tmp_path):
    classifier = fit(tmp_path, learning_rate=0.2, warmup=0.25)
    assert classifier.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert classifier.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


def test_training_without_an_end_needs_a_constant_rate(tmp_path):
    with pytest.raises(ValueError, match="--model.schedule constant --model.warmup 0"):
        make_trainer(tmp_path, max_epochs=-1).fit(Classifier(), datamodule=Digits())


@pytest.mark.parametrize("every_n_steps", [2, 3])
def test_weight_projection_sets_filters_to_unit_norm(tmp_path, every_n_steps):
    before, after = [], []

    class Spy(L.Callback):
        def __init__(self, seen):
            self.seen = seen

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append([layer.weight.detach().clone() for layer in decoupled(module)])

    fit(tmp_path, Spy(before), WeightProjection(every_n_steps), Spy(after))
    assert len(before) == 4
    for step, layers in enumerate(zip(before, after, strict=True), start=1):
        for old, new in zip(*layers, strict=True):
            norms = (old.square().sum((1, 2, 3), keepdim=True) + 1e-4).sqrt()
            torch.testing.assert_close(new, old / norms if step % every_n_steps == 0 else old)


def test_weight_projection_does_not_change_what_the_network_answers(tmp_path):
    classifier = fit(tmp_path)
    images = torch.rand(8, 1, 8, 8)
    before = classifier.model.eval()(images)
    for layer in decoupled(classifier):
        layer.weight.data /= layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(classifier.model(images), before, rtol=2e-3, atol=2e-3)


def test_weighted_gradients_multiply_by_the_filters_norm(tmp_path):
    gradients = []

    class Spy(L.Callback):
        def on_before_optimizer_step(self, trainer, module, *_):
            if not gradients or len(gradients) == 1 and module.second:
                gradients.append([(layer.weight.grad.clone(), layer.weight.clone()) for layer in decoupled(module)])

    for callbacks, second in (((Spy(),), False), ((WeightedGradients(), Spy()), True)):
        L.seed_everything(0, verbose=False)
        classifier = Classifier()
        classifier.second = second
        make_trainer(tmp_path, *callbacks).fit(classifier, datamodule=Digits(augment="none"))
    for (plain, weight), (weighted, _) in zip(*gradients, strict=True):
        norms = (weight.square().sum((1, 2, 3), keepdim=True) + 1e-4).sqrt()
        torch.testing.assert_close(weighted, plain * norms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 1.0}, r"warmup is a share in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is a share"),
        ({"learning_rate": 0}, "learning_rate must be more than 0"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"orthogonality": -1}, "orthogonality must not be negative"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**settings)


def test_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Classifier needs a data module of zoo.data"):
        make_trainer(tmp_path).test(Classifier(), torch.utils.data.DataLoader(torch.zeros(2, 1, 8, 8)))
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        WeightProjection(0)


def last_checkpoint(folder):
    return LastCheckpoint(), L.pytorch.callbacks.ModelCheckpoint(folder, filename="best", monitor="val_accuracy")


class StopAfter(L.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize(
    "settings",
    [
        {"operator": LEARNED},
        {"init_from": "digits_cnn6_tanh_cosine", "freeze_epochs": 2, "backbone_learning_rate": 1e-4},
    ],
    ids=["learned", "frozen"],
)
def test_resuming_gives_what_going_on_would_have_given(tmp_path, settings):
    """Stopping after some epochs of four and resuming is training for four, while frozen and afterwards."""

    def train(folder, stop_after, ckpt_path=None):
        L.seed_everything(0, verbose=False)
        classifier = Classifier(**settings)
        trainer = make_trainer(tmp_path, *last_checkpoint(folder), StopAfter(stop_after), max_epochs=4)
        trainer.fit(classifier, datamodule=Digits(augment="none"), ckpt_path=ckpt_path, weights_only=True)
        return classifier

    whole = train(tmp_path / "whole", 4)
    for stop in (1, 2, 3):
        folder = tmp_path / f"{stop}"
        train(folder, stop)
        resumed = train(folder, 4, folder / "last.ckpt")
        for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), (stop, name)


def test_the_last_checkpoint_is_the_last_epoch_and_loads_alone(tmp_path):
    L.seed_everything(0, verbose=False)
    classifier = Classifier(operator=LEARNED)
    make_trainer(tmp_path, *last_checkpoint(tmp_path), max_epochs=3).fit(classifier, datamodule=Digits())
    saved = read_lightning_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 12 and saved["decoupled_zoo"]["training"]["epochs"] == 3
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.model(images), classifier.model.eval()(images))
    assert loaded.model.spec == classifier.model.spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "resnet20"}, "holds cnn6 with tanh_cosine and 10 classes, but resnet20 with tanh_cosine"),
        ({"operator": "ball_cosine"}, "but cnn6 with ball_cosine and 10 classes was asked for; leave out"),
        ({"architecture_args": {"relu": False}}, "but cnn6 {'relu': False} with tanh_cosine"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, settings, message):
    fit(tmp_path, *last_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(
            Classifier(**settings), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "foreign"])
def test_a_damaged_or_foreign_lightning_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    if content == "truncated":
        fit(tmp_path, *last_checkpoint(tmp_path))
        path.write_bytes(path.read_bytes()[:10_000])
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="last.ckpt"):
        read_lightning_checkpoint(path)


def test_fine_tuning_starts_from_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    source = zoo.build("cnn6", "ball_cosine", in_chans=3, num_classes=4, mean=[0.1] * 3, std=[0.9] * 3)
    zoo.save(source, tmp_path / "photos_cnn6_ball_cosine")
    with pytest.warns(UserWarning, match="now takes 1 channels"):
        classifier = fit(tmp_path, init_from=str(tmp_path / "photos_cnn6_ball_cosine"), learning_rate=1e-9)
    spec = classifier.model.spec
    assert (spec.operator.name, spec.in_chans, len(spec.class_names)) == ("ball_cosine", 1, 10)
    assert spec.std == pytest.approx((0.9 / 3**0.5,)), "the checkpoint's, for one channel instead of three"
    torch.testing.assert_close(classifier.model.network.features[3].weight, source.network.features[3].weight)
    assert classifier.model.network.fc.out_features == 10


def test_fine_tuning_at_another_size_keeps_that_size(tmp_path):
    zoo.save(zoo.build("cnn6", in_chans=1, input_size=32), tmp_path / "large_cnn6_conv")
    assert fit(tmp_path, init_from=str(tmp_path / "large_cnn6_conv")).model.transform.input_size == 8


def test_fine_tuning_at_a_size_that_the_network_cannot_take_is_refused(tmp_path):
    zoo.save(zoo.build("cnn9", in_chans=1), tmp_path / "large_cnn9_conv")
    with pytest.raises(ValueError, match="cnn9, made for images of 32×32 pixels, cannot take 8×8"):
        fit(tmp_path, init_from=str(tmp_path / "large_cnn9_conv"))


@pytest.mark.parametrize("change", [{"num_classes": 4}, {"in_chans": 3}, {"input_size": 32}], ids=str)
def test_measuring_a_network_on_other_data_than_its_own_is_refused(tmp_path, change):
    zoo.save(zoo.build("cnn6", **{"in_chans": 1, "input_size": 8} | change), tmp_path / "other_cnn6_conv")
    classifier = Classifier(init_from=str(tmp_path / "other_cnn6_conv"))
    with pytest.raises(ValueError, match=r"the network has \w+ .*, but Digits has .*; choose the data"):
        make_trainer(tmp_path).test(classifier, datamodule=Digits())


def test_other_class_names_of_the_same_number_are_refused(tmp_path):
    fit(tmp_path, *last_checkpoint(tmp_path))

    class Renamed(Digits):
        class_names = list("abcdefghij")

    with pytest.raises(ValueError, match=r"the network has class_names \('0', .*, but Digits has \['a'"):
        make_trainer(tmp_path).test(Classifier(), Renamed(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("settings", [{"learning_rate": 1e-5}, {"optimizer": "sgd"}, {"weight_decay": 0.5}])
def test_an_optimiser_cannot_change_when_a_run_goes_on(tmp_path, settings):
    fit(tmp_path, *last_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=f"{next(iter(settings))} cannot change when a run goes on"):
        make_trainer(tmp_path).fit(
            Classifier(**settings), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


def test_training_stops_where_a_gradient_is_not_finite(tmp_path):
    class Poison(L.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 2:
                module.model.network.features[3].weight.grad[0] = float("nan")

    told = (
        r"at step 2 \(epoch 1, batch 3\) before .*: the gradient of \S*features.3.weight is not finite; lower --model"
    )
    with pytest.raises(FloatingPointError, match=told):
        fit(tmp_path, Poison(), *last_checkpoint(tmp_path))
    assert not (tmp_path / "last.ckpt").exists()


class Explode(L.Callback):
    """Makes something too large before the step of a batch."""

    def __init__(self, step, what):
        self.step = step
        self.what = what

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.global_step == self.step:
            with torch.no_grad():
                if self.what == "a bias":
                    module.model.network.features[4].bias.fill_(3e38)
                else:
                    module.model.network.features[3].weight[0] = float("inf")
            self.before = {name: value.clone() for name, value in module.model.named_parameters()}


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a bias", r"the output of \S*features\.\d+ is not finite"),
        ("a weight", r"the weights of \S*features\.3\.weight, before the step, is not finite"),
    ],
)
def test_bad_numbers_stop_before_they_reach_the_weights(tmp_path, what, told):
    explode = Explode(5, what)
    classifier = Classifier(operator="linear_cosine")
    trainer = make_trainer(tmp_path, explode, *last_checkpoint(tmp_path), max_epochs=2)
    with pytest.raises(FloatingPointError, match=rf"at step 5 \(epoch 2, batch 2\) before it changed.*: {told}"):
        trainer.fit(classifier, datamodule=Digits())
    for name, value in classifier.model.named_parameters():
        assert torch.equal(value, explode.before[name])
    saved = read_lightning_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 4 and all(value.isfinite().all() for value in saved["state_dict"].values())


def test_looking_for_a_bad_layer_leaves_the_network_as_it_was():
    model = zoo.load("digits_cnn6_tanh_cosine").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert first_bad_layer(model, torch.rand(8, 1, 8, 8)) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.network.features[3].weight[0] = float("nan")
    assert first_bad_layer(model, torch.rand(8, 1, 8, 8)) == "network.features.3"


def test_steps_that_float16_skips_are_counted_and_end_a_training_that_stands_still():
    scaler = torch.amp.GradScaler("cpu")
    trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=scaler), global_step=0)
    logged, module = [], types.SimpleNamespace(log=lambda name, value: logged.append(value))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, counter = torch.optim.SGD([weight], lr=0.1), SkippedSteps()

    def step(gradient):
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trainer.global_step += 1
        counter.on_train_batch_end(trainer, module)

    for gradient in (1.0, float("inf"), float("nan"), 1.0):
        step(gradient)
    assert logged == [0, 1, 2, 2] and weight.item() == pytest.approx(0.8)
    # A batch whose gradients are only accumulated is no step.
    counter.on_train_batch_end(trainer, module)
    assert logged == [0, 1, 2, 2]
    resumed = SkippedSteps()
    resumed.load_state_dict(counter.state_dict())
    assert (resumed.skipped, resumed.scale) == (2, scaler.get_scale())
    with pytest.raises(FloatingPointError, match="at step 29, for the gradients of 25 steps in a row were not finite"):
        for _ in range(30):
            step(float("inf"))
    assert weight.item() == pytest.approx(0.8)


def test_the_average_of_the_weights_is_what_is_validated_and_saved(tmp_path):
    class Watch(L.Callback):
        """Keeps the weights after each step, and those that are validated."""

        def __init__(self):
            self.steps, self.validated = [], None

        def on_train_batch_end(self, trainer, module, *_):
            self.steps.append({name: value.clone() for name, value in module.model.state_dict().items()})

        def on_validation_batch_start(self, trainer, module, *_):
            self.validated = {name: value.clone() for name, value in module.model.state_dict().items()}

    watch = Watch()
    classifier = fit(tmp_path, watch, *last_checkpoint(tmp_path), operator=LEARNED, ema=0.15)
    saved = read_lightning_checkpoint(tmp_path / "last.ckpt")
    for name, value in classifier.model.state_dict().items():
        expected = watch.steps[0][name]
        for count, step in enumerate(watch.steps[1:], start=1):
            decay = min(0.15, (1 + count) / (10 + count))
            averaged = decay * expected + (1 - decay) * step[name]
            expected = averaged if value.is_floating_point() else step[name]
        torch.testing.assert_close(value, expected)
        assert torch.equal(value, watch.validated[name]) and torch.equal(value, saved["state_dict"][f"model.{name}"])
        assert torch.equal(watch.steps[-1][name], saved["current_model_state"][f"model.{name}"])
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(next(loaded.model.parameters()), next(classifier.model.parameters()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_and_precision_change_the_weights_by_rounding_alone(tmp_path, precision, channels_last):
    def train(**settings):
        L.seed_everything(0, verbose=False)
        classifier = Classifier("resnet20", LEARNED, optimizer="sgd", warmup=0.0, learning_rate=0.01, **settings)
        make_trainer(tmp_path, precision=settings_of_trainer).fit(classifier, datamodule=Digits(augment="none"))
        return classifier

    settings_of_trainer = "32-true"
    before = torch.cat([value.flatten() for value in train().model.parameters()])
    settings_of_trainer = precision
    classifier = train(channels_last=channels_last)
    weight = classifier.model.network.blocks[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last and weight.dtype == torch.float32
    after = torch.cat([value.flatten() for value in classifier.model.parameters()])
    assert (after - before).norm() < (0.02 if precision == "bf16-mixed" else 1e-4) * before.norm()
    assert torch.equal(after, before) == (precision == "32-true" and channels_last)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    def train(batch_size, parts):
        L.seed_everything(0, verbose=False)
        classifier = Classifier("cnn9", "sphere_cosine", {"batch_norm": False}, optimizer="sgd", warmup=0.0)
        trainer = make_trainer(tmp_path, accumulate_grad_batches=parts, limit_train_batches=3 * parts)
        trainer.fit(classifier, datamodule=Digits(batch_size, augment="crop"))
        return classifier.model.state_dict()

    for (name, one), other in zip(train(64, 1).items(), train(16, 4).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_a_dry_run_saves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, *last_checkpoint(tmp_path), fast_dev_run=True)
    trainer.fit(Classifier(), datamodule=Digits())
    assert not list(tmp_path.rglob("*.ckpt"))


def parameters_of(classifier, part):
    head = {id(parameter) for parameter in classifier.model.network.get_classifier().parameters()}
    return {
        name: value.detach().clone()
        for name, value in classifier.model.state_dict(keep_vars=True).items()
        if (id(value) in head) == (part == "head")
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_backbone_stays_to_the_bit_and_then_trains(tmp_path, optimizer):
    snapshots = []

    class Spy(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            snapshots.append((parameters_of(module, "backbone"), parameters_of(module, "head")))

    L.seed_everything(0, verbose=False)
    classifier = Classifier(init_from="digits_cnn6_tanh_cosine", optimizer=optimizer, freeze_epochs=2)
    start = zoo.load("digits_cnn6_tanh_cosine")
    make_trainer(tmp_path, Spy(), WeightProjection(1), max_epochs=3).fit(classifier, datamodule=Digits())
    before = {f"network.{name}": value for name, value in start.network.state_dict().items()}
    for backbone, _ in snapshots[:2]:
        assert all(torch.equal(before[name], value) for name, value in backbone.items())
    assert all(not torch.equal(before[name], value) for name, value in snapshots[0][1].items())
    changed = [name for name, value in snapshots[2][0].items() if not torch.equal(before[name], value)]
    assert set(changed) == set(snapshots[2][0]), "filters and BatchNorm's statistics"


def test_the_statistics_of_norms_stay_and_all_else_is_trained(tmp_path):
    classifier = fit(tmp_path, init_from="digits_cnn6_tanh_cosine", freeze_norms=True)
    before = zoo.load("digits_cnn6_tanh_cosine").network.state_dict()
    after = classifier.model.network.state_dict()
    same = {name for name, value in after.items() if torch.equal(before[name], value)}
    assert same == {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def test_a_backbone_that_stays_frozen_to_the_end_is_told(tmp_path, caplog):
    fit(tmp_path, freeze_epochs=1)
    assert "only the classifier is trained: freeze_epochs is 1, max_epochs 1" in caplog.text
    caplog.clear()
    fit(tmp_path / "all")
    assert "only the classifier" not in caplog.text


def test_frozen_gradients_are_dropped_also_where_they_have_been_computed(tmp_path):
    class AskForAll(L.Callback):
        """Compute every gradient, as several processes do."""

        def on_train_batch_start(self, trainer, module, *_):
            module.requires_grad_(True)

    classifier = fit(tmp_path, AskForAll(), init_from="digits_cnn6_tanh_cosine", freeze_epochs=1)
    before = zoo.load("digits_cnn6_tanh_cosine").network.state_dict()
    for name, value in classifier.model.network.state_dict().items():
        assert torch.equal(before[name], value) == (not name.startswith("fc.")), name
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_the_backbone_has_a_learning_rate_of_its_own(tmp_path):
    classifier = fit(tmp_path, learning_rate=0.1, backbone_learning_rate=0.01, weight_decay=0.3, schedule="constant")
    names = {id(parameter): name for name, parameter in classifier.model.named_parameters()}
    groups = {
        (group["lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in classifier.trainer.optimizers[0].param_groups
    }
    assert groups[0.1, 0.3] == {"network.fc.weight"} and groups[0.1, 0.0] == {"network.fc.bias"}
    assert groups[0.01, 0.3] == {name for name, value in classifier.model.named_parameters() if value.ndim == 4}
    assert sum(map(len, groups.values())) == len(names) and len(groups) == 4


def test_mixup_mixes_images_and_labels_alike(tmp_path):
    classifier = fit(tmp_path, mixup=0.5)
    images = torch.eye(10).view(10, 1, 1, 10).expand(10, 1, 8, 10).contiguous()[..., :8]
    labels = torch.arange(10)
    mixed, shares = classifier.mix(images, labels)
    torch.testing.assert_close(shares.sum(1), torch.ones(10))
    torch.testing.assert_close(mixed[:, 0, 0], shares[:, :8])
    assert ((shares > 0).sum(1) == 2).all()
    assert fit(tmp_path / "none").mix is None


def test_a_plain_checkpoint_is_converted_and_calibrated_before_training(tmp_path):
    settings = {"init_from": "digits_cnn6_conv", "operator": "ball_cosine", "learning_rate": 1e-9}
    converted = fit(tmp_path, **settings, freeze_epochs=1).model
    assert converted.spec.operator.weighting == "linear" and not converted.describe().layer_settings
    calibrated = fit(tmp_path, **settings, freeze_epochs=1, calibrate=0.9).model
    accuracies = [zoo.accuracy(model, Digits().evaluation_batches("test"))[0] for model in (converted, calibrated)]
    assert accuracies[0] < 0.5 and accuracies[1] > 0.95
    settings["operator"] = {"name": "ball_cosine", "weighting": "tanh"}
    assert fit(tmp_path, **settings).model.spec.operator.weighting == "tanh"
    plain = fit(tmp_path, init_from="digits_cnn6_conv").model
    assert plain.spec.operator is None and not decoupled(plain)


def test_a_calibrated_network_goes_on_and_loads_with_its_calibration(tmp_path):
    settings = {"init_from": "digits_cnn6_conv", "operator": "seg_cosine", "calibrate": 0.9}
    model = fit(tmp_path, *last_checkpoint(tmp_path), **settings).model.eval()
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.model(images), model(images))
    assert len(loaded.model.spec.layer_settings) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_epochs": -1}, "freeze_epochs must not be negative, got -1"),
        ({"mixup": -0.1}, "mixup must not be negative, got -0.1"),
        ({"backbone_learning_rate": 0.0}, "backbone_learning_rate must be more than 0, got 0"),
    ],
)
def test_wrong_settings_of_fine_tuning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**settings)
