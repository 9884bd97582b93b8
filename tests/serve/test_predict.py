# ruff: noqa: E402  (what may be missing is asked for first)

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
runner = pytest.importorskip("typer.testing").CliRunner()

from convinit.cli.app import app
from convinit.models import ConvMixer, SimpleViT
from convinit.serve import (
    ImageSpec,
    Prediction,
    TrainedModel,
    Unreadable,
    image_files,
    load_trained,
    predict,
    read_batch,
    save_trained,
)
from convinit.train import augmentation, load_data
from convinit.train.build import build_with_report
from convinit.train.config import Config
from convinit.train.run import run_training

SPEC = ImageSpec((6, 9), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), ("cat", "dog, small", "[b]eel"))


def vit(spec=SPEC, **options):
    shape = {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 8, "kernel_size": 3}
    generator = torch.Generator().manual_seed(0)
    return SimpleViT(
        spec.image_size,
        3,
        len(spec.class_names),
        channels=spec.channels,
        generator=generator,
        **shape | options,
    ).eval()


@pytest.fixture
def folder(tmp_path):
    """A model with all that `predict` needs."""
    vit().save_pretrained(tmp_path / "model", metadata=dataclasses.asdict(SPEC))
    return tmp_path / "model"


def picture(path, size=(9, 6), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


# --- checkpoints ------------------------------------------------------------------------------------------

MODELS = {
    "vit": {"name": "simple_vit", "patch_size": 2, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 8},
    "mixer": {"name": "convmixer", "patch_size": 2, "dim": 8, "depth": 1},
    "timm": {
        "name": "vit_tiny_patch16_224", "patch_size": 2,
        "options": {"depth": 1, "embed_dim": 16, "num_heads": 2},
    },
    "timm, mixer": {
        "name": "mixer_s16_224", "patch_size": 2,
        "options": {"num_blocks": 1, "embed_dim": 16, "mlp_ratio": [1, 2]},
    },
    "torchvision": {
        "name": "torchvision:VisionTransformer", "patch_size": 2,
        "options": {"num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 8},
    },
    "vit_pytorch": {
        "name": "vit-pytorch:SimpleViT", "patch_size": 2,
        "options": {"depth": 1, "dim": 16, "heads": 2, "dim_head": 8, "mlp_dim": 8},
    },
}  # fmt: skip


def train(name, out, **recipe):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    config = Config.of(
        {
            "model": MODELS[name],
            "init": {"kernel_size": 3},
            "data": {"name": "digits", "train_count": 60},
            "recipe": {"epochs": 1, "batch_size": 30, "lr": 1e-2, **recipe},
            "run": {"cpu": True, "tracker": "none"},
        }
    )
    return run_training(config, out).checkpoint


def logits(model, data, count=20):
    transform = augmentation("none", data)
    with torch.inference_mode():
        return model(torch.stack([transform(data.test[i][0]) for i in range(count)]))


def test_a_checkpoint_becomes_folder_and_classifies_as_in_training(tmp_path, monkeypatch):
    checkpoint = train("vit", tmp_path / "run", ema=0.5)

    def no_fit(*args, **kwargs):
        raise AssertionError("loading must not fit")

    monkeypatch.setattr("convinit.init.query_key.fit_qk", no_fit)
    state = torch.get_rng_state()
    trained, average = (load_trained(tmp_path / "run", weights=each) for each in ("model", "ema"))
    assert torch.equal(torch.get_rng_state(), state)
    data = load_data("digits")
    top1 = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for each, key in ((trained, "top1"), (average, "ema_top1")):
        count = len(data.test)
        labels = torch.tensor([data.test[i][1] for i in range(count)])
        right = (logits(each.network, data, count).argmax(1) == labels).sum().item()
        assert right / count == pytest.approx(top1[key])
    assert trained.images == ImageSpec((8, 8), data.mean, data.std, tuple("0123456789"))
    assert trained.training["epoch"] == 1 and "root" not in trained.training["config"]["data"]

    files = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(files):
        Image.fromarray(data.test[i][0][0].numpy()).save(path)
    found = list(predict(trained, files, top_k=3, batch_size=7))
    expected = logits(trained.network, data).softmax(1).topk(3)
    assert [each.indices for each in found] == [tuple(row) for row in expected.indices.tolist()]
    assert [each.classes for each in found] == [tuple(map(str, each.indices)) for each in found]
    got = torch.tensor([each.probabilities for each in found])
    torch.testing.assert_close(got, expected.values, rtol=1e-4, atol=1e-6)

    save_trained(average, tmp_path / "saved")
    again = load_trained(tmp_path / "saved")
    assert torch.equal(logits(again.network, data), logits(average.network, data))
    assert (again.images, again.training["weights"]) == (average.images, "ema")
    assert isinstance(SimpleViT.from_pretrained(tmp_path / "saved"), SimpleViT)

    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load_trained(checkpoint)
    with pytest.raises(ValueError, match="is no checkpoint, got 'ema'"):
        load_trained(tmp_path / "saved", weights="ema")


@pytest.mark.parametrize("library", ["torchvision", "vit_pytorch"])
def test_models_of_other_libraries(library, tmp_path):
    """Trained from impulses on grey images, read again, and refused where they would be saved."""
    pytest.importorskip(library, exc_type=ImportError)
    trained = load_trained(train(library, tmp_path / "run"))
    assert type(trained.network).__module__.startswith(library)
    data = load_data("digits")
    labels = torch.tensor([data.test[i][1] for i in range(len(data.test))])
    right = (logits(trained.network, data, len(labels)).argmax(1) == labels).float().mean().item()
    top1 = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    assert right == pytest.approx(top1)
    config = Config.of({"model": MODELS[library], "init": {"kernel_size": 3}})
    first, second = (build_with_report(config, image_size=8, channels=1, num_classes=10) for _ in range(2))
    assert "2 heads by 'impulse'" in str(first[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    with pytest.raises(ValueError, match="network must be SimpleViT, ConvMixer or timm's, got "):
        save_trained(trained, tmp_path / "saved")


def test_timms_models_and_timms_layout(tmp_path):
    timm = pytest.importorskip("timm")
    trained = load_trained(train("timm", tmp_path / "run"))
    save_trained(trained, tmp_path / "saved")
    data = load_data("digits")
    for other in (
        load_trained(tmp_path / "saved").network,
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval(),
    ):
        assert torch.equal(logits(other, data), logits(trained.network, data))
    with pytest.raises(ValueError, match="has no moving average"):
        load_trained(tmp_path / "run", weights="ema")

    config = json.loads((tmp_path / "saved" / "config.json").read_text())

    def fails(match, **changes):
        (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=match):
            load_trained(tmp_path / "saved")

    arguments = config["model_args"]
    fails("must not give timm checkpoint_path", model_args={**arguments, "checkpoint_path": "x.pth"})
    fails("must not give timm pretrained", model_args={**arguments, "pretrained": True})
    fails("must name a model that this timm", architecture="hf-hub:timm/vit_tiny_patch16_224")
    fails("must name a timm model and its arguments", architecture=3)
    fails("does not describe timm's", model_args={**arguments, "depht": 2})
    fails("of another model than VisionTransformer", model_args={**arguments, "depth": 2})
    # None of these is built, or given memory: the shapes in the file are looked at first.
    fails("has far more weights than", model_args={**arguments, "depth": 10**6})
    fails("of another model than VisionTransformer", model_args={**arguments, "embed_dim": 10**6})
    fails("of another model than VisionTransformer", model_args={**arguments, "img_size": 10**4})
    fails("of another model than VisionTransformer", model_args={**arguments, "num_classes": 10**9})
    fails("image_size must have at most", metadata={**config["metadata"], "image_size": [10**6, 10**6]})


def test_an_mlp_mixer_of_a_size_without_a_name(tmp_path):
    trained = load_trained(train("timm, mixer", tmp_path / "run"))
    save_trained(trained, tmp_path / "saved")
    data = load_data("digits")
    again = load_trained(tmp_path / "saved").network
    assert torch.equal(logits(again, data), logits(trained.network, data))


@pytest.mark.slow
def test_a_convmixer_from_its_checkpoint(tmp_path):
    trained = load_trained(train("mixer", tmp_path / "run"))
    save_trained(trained, tmp_path / "saved")
    data = load_data("digits")
    loaded = ConvMixer.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, data), logits(trained.network, data))


# --- folders ----------------------------------------------------------------------------------------------


def test_a_model_without_its_facts(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "a", metadata={"mean": [0.5]})
    with pytest.raises(ValueError, match=r"config.json .*image_size, std, class_names not given"):
        load_trained(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_trained(tmp_path)
    with pytest.raises(ValueError, match="weights must be model or ema"):
        load_trained(tmp_path / "a", weights="best")
    with pytest.raises(ValueError, match="network must be SimpleViT, ConvMixer or timm's, got Linear"):
        save_trained(TrainedModel(torch.nn.Linear(2, 2), SPEC), tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text('{"class": "Resnet", "metadata": {}}')
    with pytest.raises(ValueError, match="must describe a SimpleViT or ConvMixer, or a timm model"):
        load_trained(tmp_path / "a")


def test_metadata_must_be_of_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"image_size": [10**6, 10**6]}, "image_size must have at most 16,777,216 pixels, got"),
        ({"image_size": [9, 6]}, r"takes images of \(6, 9\) and has 3 outputs, got image_size \(9, 6\)"),
        ({"class_names": ["a", "b"]}, "has 3 outputs, got image_size .* and 2 class_names"),
    ):
        edited = {**config, "metadata": {**config["metadata"], **change}}
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=match):
            load_trained(folder)


@pytest.mark.parametrize("name", ["progress.json", "config.toml", "model.safetensors"])
def test_edited_checkpoints_are_refused(name, tmp_path):
    """Only bytes that were written are used: a depth of a million is never built."""
    path = train("vit", tmp_path / "run") / name
    content = path.read_bytes()
    for edit in (
        content.replace(b"depth = 1\n", b"depth = 1000000\n").replace(b'"step": 2', b'"step": 2000000'),
        content[:-3] + b"\0\1\2", content[: len(content) // 2], b"", b"[]", b"{}", b"null",
    ):  # fmt: skip
        if edit != content:
            path.write_bytes(edit)
            with pytest.raises(ValueError, match=r"is damaged \(.*\); remove it to start anew|has format"):
                load_trained(tmp_path / "run")
    path.write_bytes(content)
    load_trained(tmp_path / "run")
    (path.parent / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="is damaged .*SHA256SUMS.* remove it to start anew"):
        load_trained(tmp_path / "run")


def test_a_hostile_checkpoint_is_not_built(tmp_path):
    """Whoever can write the sums as well still cannot make anybody build what the weights are not of."""
    checkpoint = train("vit", tmp_path / "run")
    config = (checkpoint / "config.toml").read_text().replace("depth = 1\n", "depth = 1000000\n")
    (checkpoint / "config.toml").write_text(config)
    names = [line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(ValueError, match="has far more weights than .*model.safetensors"):
        load_trained(checkpoint)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"image_size": (6,)}, "image_size must be"),
        ({"image_size": (6, 0)}, "image_size must be"),
        ({"mean": (0.5, 0.5)}, "1 or 3 channels"),
        ({"std": (0.2,)}, "1 or 3 channels"),
        ({"std": (0.2, 0.2, 0)}, "std must be positive"),
        ({"mean": (0.2, 0.2, float("nan"))}, "mean must be finite"),
        ({"std": (0.2, 0.2, "0.2")}, "std must be a number, got '0.2'"),
        ({"image_size": ("6", 9)}, "image_size must be an int"),
        ({"image_size": (2**13, 2**13)}, "image_size must have at most 16,777,216 pixels"),
        ({"class_names": ()}, "class_names must be texts"),
        ({"class_names": "cat"}, "class_names must be a list"),
    ],
)
def test_image_specs_are_checked(wrong, match):
    with pytest.raises((ValueError, TypeError), match=match):
        dataclasses.replace(SPEC, **wrong)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_all_kinds_are_prepared_as_for_the_test(channels, tmp_path):
    pytest.importorskip("torchvision")
    from convinit.train import ImageData

    spec = SPEC if channels == 3 else dataclasses.replace(SPEC, mean=(0.4,), std=(0.2,))
    trained = TrainedModel(vit(spec), spec)
    kinds = [
        ("RGB.png", (9, 6)), ("RGB.jpg", (40, 30)), ("L.png", (5, 20)), ("RGBA.png", (31, 7)),
        ("P.gif", (10, 10)), ("CMYK.jpg", (12, 9)), ("1.png", (18, 12)), ("LA.png", (1, 1)),
        ("RGB.webp", (9, 7)),
    ]  # fmt: skip
    files = [
        picture(tmp_path / f"{i}-{name}", size, name.split(".")[0], i) for i, (name, size) in enumerate(kinds)
    ]
    nothing = load_data("digits").test
    data = ImageData(
        "folder", nothing, nothing, 3, spec.class_names, spec.image_size, channels, spec.mean, spec.std
    )
    transform = augmentation("none", data)
    found = list(predict(trained, files, top_k=9, batch_size=4))
    for path, got in zip(files, found, strict=True):
        image = Image.open(path).convert("RGB" if channels == 3 else "L")
        expected = trained.network(transform(image)[None]).softmax(1)[0]
        assert got.path == str(path) and len(got.indices) == 3
        torch.testing.assert_close(
            torch.tensor(got.probabilities), expected[list(got.indices)], rtol=1e-4, atol=1e-6
        )
        assert list(got.probabilities) == sorted(got.probabilities, reverse=True)


def test_a_picture_is_the_same_in_every_depth_and_orientation(tmp_path):
    grey = np.linspace(0, 255, 54).round().astype(np.uint8).reshape(6, 9)
    files = {
        "8.png": Image.fromarray(grey),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "turned.png": Image.fromarray(grey),
    }
    exif = files["turned.png"].getexif()
    exif[0x0112] = 8  # stored clockwise by a quarter
    files["turned.png"] = Image.fromarray(np.ascontiguousarray(np.rot90(grey, -1)))
    for name, image in files.items():
        image.save(tmp_path / name, **({"exif": exif} if name == "turned.png" else {}))
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int.tif")
    *found, refused = predict(TrainedModel(vit(), SPEC), [tmp_path / name for name in (*files, "int.tif")])
    assert len({(each.indices, each.probabilities) for each in found}) == 1
    assert isinstance(refused, Unreadable) and "mode I in TIFF has no known white" in refused.reason


def test_files_are_found_and_unreadable_ones_are_results(tmp_path):
    good = [picture(tmp_path / "b" / ".." / name) for name in ("b/z.PNG", "b/deep/er/1.png", "b/a.bmp")]
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / ".hidden.png").write_text("no image")
    (tmp_path / "b" / "deep" / "cut.png").write_bytes(good[0].read_bytes()[:60])
    picture(tmp_path / "b" / ".git" / "x.png")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    root = tmp_path / "b"
    text = root / "notes.txt"
    files, failed = image_files([root, root / "a.bmp", text, tmp_path / "none.jpg"])
    expected = [root / "a.bmp", root / "z.PNG", root / "deep" / "cut.png", root / "deep" / "er" / "1.png"]
    assert files == [*map(str, expected), str(text), str(tmp_path / "none.jpg")] and failed == []

    trained = TrainedModel(vit(), SPEC)
    found = list(predict(trained, files, batch_size=2))
    kinds = [type(each) for each in found]
    assert kinds == [Prediction, Prediction, Unreadable, Prediction, Unreadable, Unreadable]
    assert [each.path for each in found] == files
    assert "cannot identify image file" in found[4].reason and found[5].reason == "No such file or directory"
    assert list(predict(trained, [])) == []


def test_a_batch_is_some_of_the_images_as_the_model_takes_them(tmp_path):
    files = [picture(tmp_path / "images" / f"{i}.png", size=(9 + i, 6), seed=i) for i in range(7)]
    batch = read_batch([tmp_path / "images"], SPEC, most=3)
    assert batch.shape == (3, 3, 6, 9)
    assert torch.equal(batch, read_batch([files[0], files[2], files[4]], SPEC))
    assert len(read_batch(files, SPEC, most=6)) == 6 and len(read_batch(files, SPEC)) == 7
    files[2].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png: cannot be decoded"):
        read_batch([tmp_path / "images"], SPEC, most=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none is in a format that Pillow reads"):
        read_batch([tmp_path / "empty"], SPEC)
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_batch([tmp_path / "nowhere"], SPEC)


def test_wrong_arguments_and_models(tmp_path):
    path = picture(tmp_path / "a.png")
    trained = TrainedModel(vit(), SPEC)
    for wrong in ({"top_k": 0}, {"batch_size": 0}, {"device": "tpu9"}, {"device": "cuda:99"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            predict(trained, [path], **wrong)
    for call in (lambda: image_files(path), lambda: predict(trained, str(path))):
        with pytest.raises(TypeError, match="must be a list of paths, got the single one '.*a.png'"):
            call()
    few = dataclasses.replace(SPEC, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"must give \[1, 2\] logits"):
        list(predict(TrainedModel(vit(), few), [path]))
    broken = vit()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="a.png is NaN"):
        list(predict(TrainedModel(broken, SPEC), [path]))


# --- command line -----------------------------------------------------------------------------------------


def invoke(*args):
    return runner.invoke(app, [str(each) for each in args])


def test_formats_of_the_command(folder, tmp_path):
    root = tmp_path / "images"
    files = [picture(root / name, seed=i) for i, name in enumerate(("a,b.png", "[red]c.png", "ö.png"))]
    expected = list(predict(load_trained(folder), sorted(files), top_k=2))

    done = invoke("predict", folder, root, "--top-k", 2, "--format", "json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [each["file"] for each in rows] == [each.path for each in expected]
    for row, each in zip(rows, expected, strict=True):
        assert [one["class"] for one in row["predictions"]] == list(each.classes)
        assert [one["index"] for one in row["predictions"]] == list(each.indices)
        assert [one["probability"] for one in row["predictions"]] == pytest.approx(each.probabilities)

    assert invoke("predict", folder, root, "--top-k", 2, "--out", tmp_path / "x" / "o.csv").exit_code == 0
    with open(tmp_path / "x" / "o.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["file"], line["rank"], line["class"]) for line in lines] == [
        (each.path, str(rank), name) for each in expected for rank, name in enumerate(each.classes, 1)
    ]

    done = invoke("predict", folder, root, "--out", tmp_path / "o.txt")
    table = (tmp_path / "o.txt").read_text(encoding="utf-8")
    assert done.exit_code == 0 and len(table.splitlines()) == 4
    assert f"{expected[0].classes[0]} {100 * expected[0].probabilities[0]:.1f} %" in table
    assert str(files[1]) in table and "top 3" in table and "top 4" not in table


def test_unreadable_files_are_named_and_the_others_classified(folder, tmp_path):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    done = invoke("predict", folder, bad, good, tmp_path / "none.png", "--format", "csv")
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 1 + 3 and str(good) in done.stdout
    assert str(bad) in done.stderr and "none.png: No such file" in done.stderr
    assert "2 could not be read and were left out" in done.stderr


def test_errors_of_the_commands(folder, tmp_path):
    path = picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (("predict", tmp_path / "none", path), "must be one on this machine"),
        (("predict", folder, tmp_path / "empty"), "there are no images in"),
        (("predict", folder, path, "--format", "xml"), "format must be one of table, json, csv"),
        (("predict", folder, path, "--out", tmp_path), "out must be a file"),
        (("predict", folder, path, "--ema"), "is no checkpoint"),
        (("export", folder, "--out", tmp_path / "m", "--format", "tf"), "format must be one of torch-export"),
    ):
        done = invoke(*args)
        assert done.exit_code in (1, 2) and message in done.stderr, done.output
    shutil.rmtree(folder)


def test_an_interruption_leaves_what_was_found(folder, tmp_path, monkeypatch):
    files = [picture(tmp_path / "images" / f"{i}.png") for i in range(5)]

    def interrupted(*args, **kwargs):
        for i, result in enumerate(predict(*args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr("convinit.serve.predict", interrupted)
    done = invoke("predict", folder, *files, "--out", tmp_path / "o.json")
    assert done.exit_code == 130
    assert len(json.loads((tmp_path / "o.json").read_text())) == 3


def test_export_of_the_command(folder, tmp_path):
    done = invoke("export", folder, "--out", tmp_path / "m.pt2")
    assert done.exit_code == 0 and "SimpleViT as torch-export" in done.stdout, done.output
    files = {"convinit": ""}
    module = torch.export.load(tmp_path / "m.pt2", extra_files=files).module()
    images = torch.randn(3, 3, 6, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(images), vit()(images))
    assert ImageSpec.of(json.loads(files["convinit"]), tmp_path) == SPEC
    done = invoke("export", folder, "--out", tmp_path / "copy")
    assert done.exit_code == 0 and load_trained(tmp_path / "copy").images == SPEC
