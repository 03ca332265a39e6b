"""Ways to run the network: compiled, exported, in bf16, channels-last, any batch. All must give the same result."""

from __future__ import annotations

import pytest
import torch

import cigpose
from cigpose.model import estimator
from cigpose.model.estimator import Normalize, build_model, forward_flip_test, normalize
from cigpose.train.step import Losses


def make_model(config):
    """A small CIGPose with weights large enough that logits differ from each other."""
    torch.manual_seed(0)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture
def model(tiny_config):
    return make_model(tiny_config())


@pytest.fixture
def shallow_model(tiny_config):
    """Compiling takes seconds a layer."""
    return make_model(tiny_config(model__backbone__out_stage=2))


@pytest.fixture
def whole_model(tiny_config):
    """With all four stages."""
    return make_model(tiny_config(model__backbone__out_stage=4))


def make_batch(size):
    generator = torch.Generator().manual_seed(size)
    images = normalize(torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, generator=generator)).contiguous()
    keypoints = torch.rand(size, 133, 2, generator=generator) * 64
    return images, keypoints, (torch.rand(size, 133, generator=generator) > 0.2).float()


def losses_and_gradients(model, run, batch):
    model.train().zero_grad()
    losses = run(*batch)
    losses["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in losses.items()}, gradients


def assert_close_training(own, expected, rtol):
    for key in expected[0]:
        torch.testing.assert_close(own[0][key], expected[0][key], rtol=rtol, atol=1e-6, msg=key)
    assert own[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.norm() + 1e-3 * max(g.norm() for g in expected[1].values())
        assert (own[1][name] - gradient).norm() < rtol * scale, name


def test_shapes_and_types_are_as_documented(model):
    images, keypoints, visible = make_batch(3)
    simcc_x, simcc_y = model.eval()(images)
    assert simcc_x.shape == simcc_y.shape == (3, 133, 128)
    assert simcc_x.dtype == torch.float32
    losses = model.train().loss(images, keypoints, visible)
    assert {"loss", "loss_kpt", "loss_cf", "acc_pose"} == set(losses)
    assert all(value.shape == () for value in losses.values())


@pytest.mark.slow
@torch.no_grad()
def test_a_sample_does_not_depend_on_the_batch_around_it(model):
    images = make_batch(3)[0].double()
    together = model.eval().double()(images)
    for i in range(3):
        for whole, alone in zip(together, model(images[i : i + 1]), strict=True):
            torch.testing.assert_close(alone[0], whole[i], rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_flip_test_of_a_mirrored_image_is_the_mirrored_flip_test(model):
    images, flip_index = make_batch(2)[0], torch.from_numpy(model.config.keypoint_set.flip_index)
    plain = forward_flip_test(model.eval(), images, flip_index)
    mirrored = forward_flip_test(model, images.flip(3), flip_index)
    torch.testing.assert_close(mirrored[0].index_select(1, flip_index).flip(2), plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored[1].index_select(1, flip_index), plain[1], rtol=1e-4, atol=1e-5)


def test_channels_last_gives_the_same(model):
    batch = make_batch(4)
    expected = losses_and_gradients(model, model.loss, batch)
    model.to(memory_format=torch.channels_last)
    images = batch[0].to(memory_format=torch.channels_last)
    assert model.backbone(images).is_contiguous(memory_format=torch.channels_last)
    assert_close_training(losses_and_gradients(model, model.loss, (images, *batch[1:])), expected, rtol=1e-3)


def test_bf16_autocast_is_close_and_its_losses_are_float32(tiny_config):
    torch.manual_seed(0)
    # all keypoints are replaced, or the coarser scores would choose others
    model = build_model(tiny_config(model__causal__train_top_k=133))
    images, *targets = make_batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(images, *targets)["loss"].dtype == torch.float32
    features = model.backbone(images).detach()
    expected, gradients = losses_and_gradients(model, lambda *t: model.head.loss(features, *t), targets)

    def under_autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return model.head.loss(features, *arguments)

    losses, own = losses_and_gradients(model, under_autocast, targets)
    assert losses["loss_kpt"].item() == pytest.approx(expected["loss_kpt"].item(), rel=0.01)
    assert own.keys() == gradients.keys()
    # 8 bits of mantissa: within a few per cent as a whole
    flat, reference = (torch.cat([value.flatten() for value in values.values()]) for values in (own, gradients))
    assert (flat - reference).norm() < 0.1 * reference.norm()


def test_classifiers_compute_in_float32_under_autocast(tiny_config):
    torch.manual_seed(0)
    for kind in ("cigpose", "rtmpose"):
        head = build_model(tiny_config(model__head__kind=kind)).head
        features = torch.randn(2, head.final_layer.in_channels, 4, 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for logits in head(features):
                assert logits.dtype == torch.float32
                assert not torch.equal(logits, logits.bfloat16().float()), "more digits than bfloat16 has"


@pytest.mark.slow
def test_inference_compiles_as_one_graph(shallow_model):
    model = shallow_model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        images = make_batch(2)[0]
        for own, expected in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_training_step_compiles_as_one_graph_and_moves_the_same_statistics(shallow_model):
    model = shallow_model
    batch = make_batch(4)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    expected = losses_and_gradients(model, model.loss, batch)
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(start)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    assert_close_training(losses_and_gradients(model, compiled, batch), expected, rtol=1e-3)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, statistics[key], rtol=1e-4, atol=1e-5, msg=key)
    assert model.state_dict()["head.gcn.bn_input.num_batches_tracked"] == 2


@pytest.mark.slow
def test_the_whole_model_exports_with_any_batch(whole_model):
    model = whole_model.eval()
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(model, (make_batch(2)[0],), dynamic_shapes=({0: batch},))
    assert len(program.graph.nodes) < 1500, "loops would unroll to many thousand"
    for size in (1, 3, 7):
        images = make_batch(size)[0]
        with torch.no_grad():
            for own, expected in zip(program.module()(images), model(images), strict=True):
                torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_number_of_head_operations_does_not_depend_on_edges_groups_or_batch(tiny_config):
    """No loops: a set of 3 keypoints takes as many operations as one of 133."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    names = ["a", "b", "c"]
    small_set = {"name": "three", "names": names, "sigmas": [0.1] * 3, "groups": [["a", "b"], ["c"]]}
    counts = []
    metrics = {"evaluate__metric": "body/AP", "train__validation__metric": "body/AP"}
    for keypoints, batch in (("coco_wholebody", 1), ("coco_wholebody", 4), (small_set, 4)):
        config = tiny_config(keypoints=keypoints, model__causal__train_top_k=1, **metrics)
        num_keypoints = len(config.keypoint_set)
        model = build_model(config).train()
        features = torch.randn(batch, model.backbone.out_channels, 4, 4)
        with Count() as count:
            model.head.loss(features, torch.rand(batch, num_keypoints, 2), torch.ones(batch, num_keypoints))
        counts.append(count.operations)
    assert len(set(counts)) == 1
    assert counts[0] < 500


def test_normalisation_happens_on_the_device_of_the_crops():
    assert normalize(torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device="meta")).device.type == "meta"


@pytest.mark.slow
def test_importing_the_package_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, cigpose; cigpose.presets(); assert 'torch' not in sys.modules; cigpose.codec.encode"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"build_model", "load_checkpoint", "load_preset", "presets", "codec", "Config"} <= set(dir(cigpose))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cigpose.nothing  # noqa: B018


class _Normalizing(torch.nn.Module):
    def forward(self, crops):
        return normalize(crops)


def test_an_export_leaves_later_pictures_alone():
    crops = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    estimator._statistics.cache_clear()
    torch.export.export(_Normalizing(), (crops,), strict=False)
    found = normalize(crops)
    assert type(found) is torch.Tensor
    assert torch.equal(found, Normalize()(crops))


class _Brightness(torch.nn.Module):
    """As little of a model as a step needs, so that compiling takes no time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def loss(self, images, keypoints, visible):
        return {"loss_kpt": images.mean() * self.weight, "acc_pose": visible.mean()}


def test_a_compiled_step_makes_no_constant_of_its_own(tiny_config):
    made = []

    def note(graph, _examples):
        made.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    losses = Losses(_Brightness(), tiny_config())
    assert not any("normalize" in key for key in losses.state_dict())
    batch = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 133, 2), torch.zeros(2, 133)
    torch.compile(losses, backend=note, fullgraph=True)(*batch)
    assert made and not [name for name in made if "tensor" in name.split("at 0x")[0]]
