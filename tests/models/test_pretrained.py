from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convinit import sample_offsets
from convinit.fit import Adam, Newton
from convinit.init import query_key
from convinit.models import ConvMixer, SimpleViT
from convinit.models.pretrained import read_weights

safetensors = pytest.importorskip("safetensors.torch")

VIT = {"dim": 32, "depth": 2, "num_heads": 4, "head_dim": 8, "mlp_dim": 24, "kernel_size": 3}
MIXER = {"dim": 12, "depth": 3, "kernel_size": 3}


def vit(**options):
    return SimpleViT((8, 12), 2, 5, generator=torch.Generator().manual_seed(0), **VIT | options)


def mixer(**options):
    return ConvMixer((8, 12), 2, num_classes=5, generator=torch.Generator().manual_seed(0), **MIXER | options)


def images(batch=3, dtype=torch.float32):
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def some_offsets(heads):
    return sample_offsets(heads, 3, generator=torch.Generator().manual_seed(5))


MODELS = {
    "vanilla": lambda: vit(variant="vanilla"),
    "I": lambda: vit(),
    "II, newton options": lambda: vit(variant="II", fit=Newton(max_iterations=30), peak=0.9),
    "III, frozen": lambda: vit(variant="III", trainable_mixing=False),
    "adam": lambda: vit(fit=Adam(steps=2)),
    "offsets": lambda: vit(offsets=some_offsets(4)),
    "offsets of layers, one control": lambda: vit(offsets=some_offsets(8), method="norm_matched"),
    "no values": lambda: vit(value=False, proj=False, variant="II"),
    "float64": lambda: vit(dtype=torch.float64),
    "bfloat16": lambda: vit().to(torch.bfloat16),
    "mixer": lambda: mixer(),
    "mixer, shared": lambda: mixer(method="gaussian", share_layers=True, num_filters=4),
    "mixer, matrices": lambda: mixer(method="full_permutation", matrix_form=True, trainable_mixing=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loaded_model_is_the_saved_one(name, tmp_path, monkeypatch):
    model = MODELS[name]()
    with torch.no_grad():  # unlike any initial weights, and with BatchNorm's statistics moved
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        model.train()(images(dtype=model.head.weight.dtype))
    model.save_pretrained(tmp_path / "deep" / "model", metadata={"class_names": ["a", "ö"]})
    assert {path.name for path in (tmp_path / "deep" / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }

    def no_fit(*args, **kwargs):
        raise AssertionError("from_pretrained must not fit")

    monkeypatch.setattr(query_key, "fit_qk", no_fit)
    state = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path / "deep" / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training and loaded.metadata == {"class_names": ["a", "ö"]}
    batch = images(dtype=model.head.weight.dtype)
    assert torch.equal(loaded(batch), model.eval()(batch))
    for mine, theirs in (
        (model.named_parameters, loaded.named_parameters),
        (model.named_buffers, loaded.named_buffers),
    ):
        mine, theirs = dict(mine()), dict(theirs())
        assert mine.keys() == theirs.keys()  # also: shared weights are one parameter again
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]) and tensor.dtype == theirs[key].dtype, key
            assert tensor.requires_grad == theirs[key].requires_grad, key
    monkeypatch.undo()

    # What is loaded has its constructor's arguments too: it draws as the first one, and is saved alike.
    for each in (model, loaded):
        each.reset_parameters(torch.Generator().manual_seed(9))
    assert torch.equal(loaded(batch), model(batch))
    loaded.save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("deep/model", "again")]
    assert configs[0] | {"weights_sha256": 0} == configs[1] | {"weights_sha256": 0}


def test_shared_weights_are_stored_once_and_in_the_format_of_safetensors(tmp_path):
    model = mixer(share_layers=True)
    model.save_pretrained(tmp_path)
    names = safetensors.load_file(tmp_path / "model.safetensors").keys()
    assert sum(name.endswith("spatial.weight") for name in names) == 1
    other = mixer(share_layers=True, method="impulse")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_copies_keep_their_arguments(tmp_path):
    model = vit(offsets=some_offsets(4)).eval()
    model.metadata["note"] = 1
    for i, each in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        each.save_pretrained(tmp_path / str(i))
        loaded = SimpleViT.from_pretrained(tmp_path / str(i))
        assert torch.equal(loaded(images()), model(images())) and loaded.metadata == {"note": 1}


class Wider(SimpleViT):
    def __init__(self, width: int, name: str = "wider", **options):
        super().__init__((8, 12), 2, 5, dim=4 * width, **options)
        self.name = name


@pytest.mark.parametrize("variant", ["vanilla", "I", "II", "III"])
def test_alpha_and_scale_set_later_are_kept(variant, tmp_path):
    """By `save_pretrained` and by the state_dict alone, layer by layer."""
    model = vit(variant=variant).eval()
    for i, block in enumerate(model.blocks):
        block.attn.alpha, block.attn.scale = 0.9 - 0.1 * i, 0.5 + i
    if variant == "vanilla":
        model.entry_alpha = 0.7
    model.save_pretrained(tmp_path)
    fresh = vit(variant=variant)
    fresh.load_state_dict(model.state_dict())
    for loaded in (SimpleViT.from_pretrained(tmp_path), fresh.eval()):
        assert torch.equal(loaded(images()), model(images()))
        assert loaded.entry_alpha == model.entry_alpha and loaded.blocks[1].attn.alpha == 0.8


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_assigned_to_a_model_without_memory(name):
    """Built on the meta device, then load_state_dict(assign=True): P is not among the weights."""
    model = MODELS[name]().eval()
    with torch.device("meta"):
        empty = MODELS[name]().eval()
    dtype = model.head.weight.dtype
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(images(dtype=dtype)), model(images(dtype=dtype)))
    assert [*dict(empty.named_parameters())] == [*dict(model.named_parameters())]  # shared ones stay shared
    for key, buffer in empty.named_buffers():
        assert torch.equal(buffer, model.get_buffer(key)), key


def test_assigned_weights_bring_their_dtype():
    model, other = vit().double().eval(), vit().eval()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(images(dtype=torch.float64)), model(images(dtype=torch.float64)))


def test_a_subclass_keeps_its_own_arguments(tmp_path):
    model = Wider(8, depth=1, num_heads=2, head_dim=8, mlp_dim=8, variant="II").eval()
    model.save_pretrained(tmp_path)
    loaded = Wider.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()), model(images())) and loaded.name == "wider"
    with pytest.raises(ValueError, match="must describe a SimpleViT, got 'Wider'"):
        SimpleViT.from_pretrained(tmp_path)


def test_a_positional_argument_too_many_is_the_constructors_error():
    with pytest.raises(TypeError, match="positional argument"):
        SimpleViT(8, 2, 5, 6)


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_cannot_be_loaded(tmp_path):
    vit().save_pretrained(tmp_path)
    weights, config = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "config.json").read_text()

    def restored():
        (tmp_path / "model.safetensors").write_bytes(weights)
        (tmp_path / "config.json").write_text(config)

    def fails(error, match, cls=SimpleViT, folder=tmp_path):
        with pytest.raises(error, match=match):
            cls.from_pretrained(folder)
        restored()

    arguments = json.loads(config)["arguments"]
    fails(FileNotFoundError, "folder must be one on this machine", folder=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    fails(FileNotFoundError, "has no config.json", folder=tmp_path / "empty")
    fails(ValueError, "must describe a ConvMixer, got 'SimpleViT'", cls=ConvMixer)
    (tmp_path / "config.json").write_text("{")
    fails(ValueError, "is not JSON")
    (tmp_path / "config.json").write_text("[1]")
    fails(ValueError, "must hold an object, got list")
    edited(tmp_path, arguments=[1])
    fails(ValueError, r"config.json must have a table of arguments, got \[1\]")
    edited(tmp_path, arguments={**arguments, "depht": 2})
    fails(ValueError, "does not describe a SimpleViT.*depht")
    edited(tmp_path, arguments={**arguments, "dim": 30})
    fails(ValueError, "does not describe a SimpleViT: dim must be a multiple of 4")
    edited(tmp_path, arguments={**arguments, "fit": {"fit": "os.system"}})
    fails(ValueError, "does not describe a SimpleViT")
    for name in ("nn", "load", 3):
        edited(tmp_path, dtype=name)
        fails(ValueError, "does not describe a SimpleViT: dtype must be one of torch's, such as float32, got")
    edited(tmp_path, arguments={**arguments, "num_classes": 6})
    fails(ValueError, r"head.weight \[6, 32\] float32, got \[5, 32\] float32")
    edited(tmp_path, arguments={**arguments, "depth": 3})
    fails(ValueError, r"blocks\.2.*got none; .*\(12 tensors in all\)")
    edited(tmp_path, arguments={**arguments, "depth": 1})
    fails(ValueError, "no blocks.1")
    edited(tmp_path, dtype="float16")
    fails(ValueError, "float16, got .* float32")
    # Numbers that would take all time or memory: neither is taken before shapes are compared.
    edited(tmp_path, arguments={**arguments, "depth": 10**6})
    fails(ValueError, "it has far more weights than .*model.safetensors")
    for size, message in (
        (10**7, "fewer than 2\\*\\*31 tokens"),
        (80_000, "a quarter of this machine's memory"),
    ):
        edited(tmp_path, arguments={**arguments, "image_size": size})
        fails(ValueError, message)
    edited(tmp_path, arguments={**arguments, "mlp_dim": 10**15})
    fails(ValueError, "of another model than SimpleViT")
    (tmp_path / "model.safetensors").unlink()
    fails(FileNotFoundError, "model.safetensors are missing")
    for damaged in (weights[:-10], weights[:-1] + b"x", pickle.dumps(vit().state_dict())):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        fails(ValueError, "model.safetensors is damaged, or not the file that config.json was written with")
    for damaged in (weights[:-10], pickle.dumps(vit().state_dict())):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        edited(tmp_path, weights_sha256=hashlib.sha256(damaged).hexdigest())
        fails(ValueError, "damaged or no safetensors file")
    assert SimpleViT.from_pretrained(tmp_path)(images()).shape == (3, 5)


def test_weights_may_be_replaced_on_purpose(tmp_path):
    model, other = vit().eval(), vit(method="random").eval()
    model.save_pretrained(tmp_path)
    safetensors.save_model(other, str(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["weights_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(SimpleViT.from_pretrained(tmp_path)(images()), other(images()))


@pytest.mark.parametrize("make", [vit, mixer])
def test_a_head_for_other_classes(make, tmp_path):
    model = make().eval()
    model.head = torch.nn.Linear(model.head.in_features, 7)
    model.save_pretrained(tmp_path / "new")
    loaded = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(loaded(images()), model(images())) and loaded(images()).shape == (3, 7)
    new = model.head
    for head in (
        torch.nn.Identity(),
        torch.nn.Linear(new.in_features, 7, bias=False),
        torch.nn.Sequential(new),
    ):
        model.head = head
        with pytest.raises(ValueError, match=r"as (SimpleViT|ConvMixer)'s constructor makes it.*head\."):
            model.save_pretrained(tmp_path / "other")
    model = make()
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    with pytest.raises(ValueError, match=r"constructor makes it.* no blocks\.\d"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="on the meta device"):
        vit(device="meta").save_pretrained(tmp_path / "a")
    mixed = vit()
    mixed.head.half()
    with pytest.raises(ValueError, match="one floating dtype to be saved, got torch.float16, torch.float32"):
        mixed.save_pretrained(tmp_path / "a")
    for wrong in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError), match="config.json must hold what JSON can"):
            vit().save_pretrained(tmp_path / "a", metadata=wrong)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        vit().save_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = vit().eval()
    model.save_pretrained(tmp_path)

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors, "save_model", full)
    with pytest.raises(OSError, match="no space left"):
        vit(depth=1).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(SimpleViT.from_pretrained(tmp_path)(images()), model(images()))


def test_reads_nothing_but_the_models_own_tensors(tmp_path):
    safetensors.save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors", {"a": "a", "../b": "a"})
    linear = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match=r"weight \[1, 1\] float32, got none; no a \(2 tensors"):
        read_weights(tmp_path / "w.safetensors", linear)


@pytest.mark.slow  # a fresh interpreter
def test_importing_convinit_imports_neither_safetensors_nor_huggingface_hub():
    code = "import sys, convinit; assert not {'safetensors', 'huggingface_hub'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_needs_a_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    install = r"which is not installed; get it with: pip install 'convinit\[train\]'"
    with pytest.raises(ImportError, match=f"'user/model' is no folder .* needs huggingface_hub, {install}"):
        SimpleViT.from_pretrained("user/model")
    with pytest.raises(ImportError, match=f"needs huggingface_hub, {install}"):
        vit(method="default").push_to_hub("user/model")
    with pytest.raises(FileNotFoundError, match="folder must be one on this machine"):
        SimpleViT.from_pretrained(tmp_path / "none")  # a path is no name of a repository
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=f"needs safetensors, {install}"):
        vit(method="default").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's Hub as folders of a directory, and what it was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    class Api:
        def __init__(self, token):
            asked.append(("api", {"token": token}))

        def create_repo(self, repo_id, **options):
            asked.append(("create", options))
            (tmp_path / "hub" / "me" / repo_id).mkdir(parents=True)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            asked.append(("upload", options))
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
            return "https://huggingface.co/a/commit"

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise OSError("404 Client Error")
        return str(tmp_path / "hub" / repo_id)

    # The hub's own functions take what ours are called with.
    for name, ours in (("create_repo", Api.create_repo), ("upload_folder", Api.upload_folder)):
        monkeypatch.setattr(Api, name, _as(getattr(huggingface_hub.HfApi, name), ours))
    downloads = _as(huggingface_hub.snapshot_download, snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloads)
    return tmp_path / "hub", asked


def _as(real, ours):
    """`ours`, called only as the signature of `real` allows."""

    def call(*args, **kwargs):
        inspect.signature(real).bind(*args, **kwargs)
        return ours(*args, **kwargs)

    return call


def test_a_pushed_model_comes_back_from_the_hub(hub, tmp_path, monkeypatch):
    folder, asked = hub
    monkeypatch.chdir(tmp_path)
    model = vit().eval()
    model.metadata["note"] = 1
    url = model.push_to_hub("vit", private=True, token="t", branch="b", create_pr=True)
    assert url == "https://huggingface.co/a/commit"
    commit = {"commit_message": "Push model using convinit", "revision": "b", "create_pr": True}
    assert asked == [
        ("api", {"token": "t"}),
        ("create", {"private": True, "exist_ok": True}),
        ("upload", commit),
    ]
    assert {path.name for path in (folder / "me" / "vit").iterdir()} == {"config.json", "model.safetensors"}
    loaded = SimpleViT.from_pretrained("me/vit", revision="b", token="t")
    wanted = {"allow_patterns": ["config.json", "model.safetensors"], "revision": "b", "token": "t"}
    assert asked[-1] == ("me/vit", wanted)
    assert torch.equal(loaded(images()), model(images())) and loaded.metadata == {"note": 1}
    assert not loaded.training

    mixer().save_pretrained("me/vit")  # a folder of that name wins
    assert isinstance(ConvMixer.from_pretrained("me/vit"), ConvMixer)
    (folder / "me" / "vit" / "config.json").unlink()
    shutil.rmtree("me")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        SimpleViT.from_pretrained("me/vit")
    with pytest.raises(
        FileNotFoundError,
        match="'me/none' must be a folder .* or a .*there is no such folder, and the Hub says: 404",
    ):
        SimpleViT.from_pretrained("me/none")


def test_what_is_no_name_of_a_repository_is_said_without_the_network():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="'/a/b' must be a folder .*the Hub says: Repo id must be"):
        SimpleViT.from_pretrained("/a/b")


def test_what_cannot_be_saved_makes_no_repository(hub):
    model = vit()
    model.head.half()
    with pytest.raises(ValueError, match="one floating dtype"):
        model.push_to_hub("vit")
    assert not hub[1]
