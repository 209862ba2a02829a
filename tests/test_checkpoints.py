"""Weights files: what was saved comes back, and nothing else gets in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import resource
import struct
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from cdnctl import checkpoints
from cdnctl.cards import card, export
from cdnctl.checkpoints import (
    FORMAT_VERSION,
    Header,
    build_module,
    bundled,
    load_model,
    read_header,
    save_model,
    weights_folder,
    weights_hash,
)
from cdnctl.errors import WeightsError

MODEL = {
    "num_classes": 2,
    "widths": [4],
    "blocks": [1],
    "norm": "pixel",
    "unshuffle": 2,
    "head": 4,
}
HEADER = Header(
    name="tiny",
    arch="gradresnet",
    model=MODEL,
    classes=("plain", "striped"),
    sigma_range=(0.0, 60 / 255),
    patch=16,
    training={"steps": 3, "config": {"data": {"batch": 4}}},
    data="nothing",
    version="0.0",
    scores={"psnr_25": 31.5},
)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) for k, v in build_module(HEADER).state_dict().items()}


def raw_header(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(HEADER))) | changes


def write(path: Path, state: dict[str, Tensor], header: Any, key: str = "cdnctl") -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(save(state, metadata={key: text}))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_model(path, tensors(), HEADER)
    return path


def refused(path: Path, *words: str) -> str:
    """The one error that a bad file may cost: short, and naming the file."""
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    message = str(caught.value)
    assert repr(str(path)) in message and len(message) < 500 + len(str(path))
    for word in words:
        assert word in message
    return message


# -- round trips ------------------------------------------------------------------------


def test_round_trip(good: Path) -> None:
    module, header = load_model(good)
    assert header == read_header(good) == HEADER
    state = module.state_dict()
    assert state.keys() == tensors().keys()
    assert all(torch.equal(state[k], v) for k, v in tensors().items())
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_float32(good: Path, dtype: torch.dtype) -> None:
    size = good.stat().st_size
    save_model(good, tensors(), HEADER, dtype)
    if dtype.itemsize < 4:
        assert good.stat().st_size < size
    for key, value in load_model(good)[0].state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, tensors()[key].to(dtype).float())


def test_header_says_what_the_file_is(good: Path) -> None:
    length = struct.unpack("<Q", good.read_bytes()[:8])[0]
    metadata = json.loads(good.read_bytes()[8 : 8 + length])["__metadata__"]
    written = json.loads(metadata["cdnctl"])
    assert written["format_version"] == FORMAT_VERSION
    assert written["classes"] == ["plain", "striped"]


def test_unknown_header_keys_are_let_be(good: Path) -> None:
    write(good, tensors(), raw_header(invented_later=[1, 2]))
    assert load_model(good)[1] == HEADER


def test_saving_leaves_the_callers_tensors_alone(tmp_path: Path) -> None:
    state = tensors()
    weight = state["head.linear.weight"].t().contiguous().t().requires_grad_()
    before = weight.detach().clone()
    save_model(tmp_path / "a.safetensors", state | {"head.linear.weight": weight}, HEADER)
    loaded = load_model(tmp_path / "a.safetensors")[0]
    assert torch.equal(weight, before) and weight.requires_grad
    assert torch.equal(loaded.state_dict()["head.linear.weight"], before)


def test_hash_names_the_weights(good: Path, tmp_path: Path) -> None:
    first = weights_hash(good)
    assert len(first) == 16 and int(first, 16) >= 0
    other = tmp_path / "other.safetensors"
    save_model(other, tensors(), replace(HEADER, name="renamed", scores={}))
    assert weights_hash(other) == first
    for key, value in tensors().items():
        value.view(-1)[-1] += 1
        save_model(other, tensors() | {key: value}, HEADER)
        assert weights_hash(other) != first, key


@pytest.mark.parametrize("half", [False, True])
def test_export_adds_scores_and_a_card(half: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "last.safetensors", tmp_path / "out" / "photo.safetensors"
    save_model(source, tensors(), replace(HEADER, scores={}))
    row = {"sigma": 25, "pictures": 3, "psnr": 30.125, "ssim": 0.875, "accuracy": 0.5}
    report = {"scores": [row | {"psnr_class": None}], "protocol": {"seed": 7}}
    export(source, target, {"tinyset": report}, half)
    module, header = load_model(target)
    assert header == replace(HEADER, scores={"tinyset": report})
    dtype = torch.float16 if half else torch.float32
    for key, value in module.state_dict().items():
        assert torch.equal(value, tensors()[key].to(dtype).float())
    text = target.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("# tiny", "plain, striped", "tinyset", "30.12", "0.875", weights_hash(target)):
        assert word in text
    front = dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())
    assert json.loads(front["license"]) == "mit"
    assert json.loads(front["model-index"])[0]["name"] == "tiny"


def test_a_card_says_what_sort_of_model_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for arch, camera, said in (
        ("unet", 0.8, "Denoiser of photographs"),
        ("unet", 0.0, "Denoiser, made"),
        ("classifier", 0.0, "Classifier, made"),
    ):
        training = {"config": {"noise": {"camera": camera}}}
        header = replace(HEADER, arch=arch, scores={}, training=training)
        save_model(path, build_module(header).state_dict(), header)
        text = card(path)
        assert said in text
        assert ("classes: it knows none" in text) == (arch == "unet")
    broken = replace(HEADER, arch="unet", scores={}, training={"config": {"noise": 3}})
    save_model(path, build_module(broken).state_dict(), broken)
    with pytest.raises(WeightsError, match="account of its training"):
        card(path)


@pytest.mark.parametrize(
    "training",
    [
        {"seconds": "long"},
        {"config": 3},
        {"started_from": 3},
        {"started_from": {"data": "x"}},
        {"started_from": {"weights": "x", "data": "x", "training": None}},
    ],
)
def test_a_card_of_a_damaged_account(training: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_model(path, tensors(), replace(HEADER, scores={}, training=training))
    with pytest.raises(WeightsError, match="account of its training"):
        card(path)


def test_bundled_weights_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "cdnctl"
    package.mkdir()
    monkeypatch.setattr(checkpoints, "PACKAGE", package)
    save_model(tmp_path / "weights" / "beside.safetensors", tensors(), HEADER)
    (tmp_path / "weights" / "README.md").write_text("not weights")
    assert list(bundled()) == ["beside"]  # a checkout
    save_model(package / "weights" / "inside.safetensors", tensors(), HEADER)
    assert weights_folder() == package / "weights"  # an installed package
    assert list(bundled()) == ["inside"]


# -- files that are not ours ----------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors")
    refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        pickle.dumps({"weight": [1.0, 2.0]}),
        b"PK\x03\x04" + b"\0" * 100,
    ],
    ids=range(11),
)
def test_foreign_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    refused(path)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for save_as in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        path = tmp_path / "pickle.safetensors"
        save_as({"weight": Bomb()}, path)
        refused(path)
    assert not (tmp_path / "ran").exists()


def test_safetensors_of_someone_else(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(save(tensors()))
    refused(path, "cdnctl")
    write(path, tensors(), raw_header(), key="format")
    refused(path, "cdnctl")


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, [1]])
def test_unknown_format_version(good: Path, version: Any) -> None:
    refused(write(good, tensors(), raw_header(format_version=version)), repr(version))


# -- files that are damaged -------------------------------------------------------------------


def test_truncated_anywhere(good: Path) -> None:
    data = good.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(data) - 1}
    cuts |= {len(data) * i // 50 for i in range(50)}
    for cut in sorted(cuts):
        good.write_bytes(data[:cut])
        refused(good)
    good.write_bytes(data + b"\0")
    refused(good)


def test_mutated_header_bytes(good: Path) -> None:
    """Any bytes of the header may be anything: an error of ours, or a sound model."""
    data = good.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        mutated = bytearray(data)
        start = rng.choice([0, 8, 8, 8])
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Printable bytes keep the JSON alive more often, and reach deeper.
            place, printable = rng.randrange(start, end), rng.random() < 0.7
            mutated[place] = rng.randrange(32, 127) if printable else rng.randrange(256)
        good.write_bytes(mutated)
        try:
            check_sound(*load_model(good))
            outcomes[True] += 1
        except WeightsError:
            outcomes[False] += 1
    assert all(outcomes.values()), outcomes


ODD = [None, True, 0, -1, 1, 7, 2**31, 2**63, 2**70, 1e308, -0.5]
ODD += ["", "F64", "../x", "\0", "é", [], {}]


def odd_json(value: Any, rng: random.Random) -> Any:
    """The same with one part, at any depth, made something else, left out or doubled."""
    if not (isinstance(value, dict | list) and value and rng.random() < 0.85):
        return rng.choice([*ODD, [value], {"x": value}, [value] * 3])
    copy: Any = value.copy()
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind >= 0.2:
        copy[key] = odd_json(copy[key], rng)
    elif isinstance(copy, dict):
        copy[rng.choice(["a", "", "__metadata__"])] = copy[key]
    else:
        copy.append(copy[key])
    return copy


@pytest.mark.slow
def test_any_damage_to_a_file(good: Path) -> None:
    """Thousands of files with whatever in their sizes, headers and numbers: an error of ours on
    one line, or a sound model."""
    data = good.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    own = json.loads(header["__metadata__"]["cdnctl"])
    rng = random.Random(1)

    def packed(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + body

    def damaged() -> bytes:
        kind = rng.randrange(6)
        if kind == 0:
            return packed(odd_json(header, rng))
        if kind in (1, 2):
            text = json.dumps(odd_json(own, rng))
            return packed(header | {"__metadata__": {"cdnctl": text}})
        if kind == 3:  # the numbers: infinities, NaN and what is just another number
            copy = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                copy[rng.randrange(8 + size, len(copy))] = rng.choice([0, 127, 128, 255, 7])
            return bytes(copy)
        if kind == 4:  # where the header ends
            length = rng.choice([0, 1, size - 1, size + 1, len(data), 2**32, 2**63, 2**64 - 1])
            return struct.pack("<Q", length) + data[8:]
        start, end = sorted(rng.randrange(len(data)) for _ in range(2))
        return rng.choice([data[:start], data[:start] + data[end:], data[start:], data + data])

    count, outcomes = 2000, {True: 0, False: 0}
    for _ in range(count):
        good.write_bytes(damaged())
        try:
            check_sound(*load_model(good))
            outcomes[True] += 1
        except WeightsError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
            outcomes[False] += 1
    assert sum(outcomes.values()) == count and min(outcomes.values()) > 100, outcomes


def check_sound(module: Any, header: Header) -> None:
    """What a file that loads promises to its users."""
    assert all(isinstance(v, str) for v in (header.name, header.arch, header.data, header.licence))
    assert all(isinstance(c, str) for c in header.classes)
    assert len(header.classes) == module.num_classes
    assert isinstance(header.patch, int) and header.patch >= 1
    low, high = header.sigma_range
    assert 0 <= low <= high < math.inf
    assert all(isinstance(m, dict) for m in (header.model, header.training, header.scores))
    assert all(v.isfinite().all() for v in module.state_dict().values())


# -- tensors that do not fit -------------------------------------------------------------------


def test_missing_and_surplus_tensors(good: Path) -> None:
    state = tensors()
    for key in state:
        some = {k: v for k, v in state.items() if k != key}
        refused(write(good, some, raw_header()), key, "lacks")
    refused(write(good, state | {"extra": torch.zeros(1)}, raw_header()), "extra", "unknown")
    refused(write(good, {}, raw_header()), "lacks")


def test_wrong_shapes(good: Path) -> None:
    for key, value in tensors().items():
        for wrong in (value[None], value.flatten()[:1], torch.zeros(0), torch.cat([value, value])):
            if wrong.shape != value.shape:
                state = tensors() | {key: wrong.contiguous()}
                refused(write(good, state, raw_header()), key, str(tuple(wrong.shape)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_numbers(good: Path, poison: float) -> None:
    for key, value in tensors().items():
        value.view(-1)[-1] = poison
        for dtype in (torch.float32, torch.float16):
            refused(write(good, tensors() | {key: value.to(dtype)}, raw_header()), key)


def test_values_that_float32_cannot_hold(good: Path) -> None:
    state = {k: v.double() for k, v in tensors().items()}
    state["head.linear.bias"][0] = 1e300
    refused(write(good, state, raw_header()), "head.linear.bias")


@pytest.mark.parametrize(
    "dtype",
    ["int64", "bool", "uint8", "complex64", "float8_e4m3fn", "float8_e5m2"],
)
def test_other_types_of_tensors(good: Path, dtype: str) -> None:
    key = "head.linear.bias"
    refused(
        write(good, tensors() | {key: tensors()[key].to(getattr(torch, dtype))}, raw_header()), key
    )


# -- headers that lie --------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**12, 2**63, -(2**63), 10**30])
    | st.floats()
    | st.sampled_from(["", "gradresnet", "unet", "group", "\0", "\ud800", "x" * 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@given(st.sampled_from(sorted(raw_header())), JSON)
@FUZZ
def test_any_value_in_any_header_field(good: Path, key: str, value: Any) -> None:
    write(good, tensors(), raw_header(**{key: value}))
    with contextlib.suppress(WeightsError):
        check_sound(*load_model(good))


@pytest.mark.slow
@given(st.sampled_from([*sorted(MODEL), "side", "groups", "down", "channels", "new"]), JSON)
@FUZZ
def test_any_value_in_any_model_field(good: Path, key: str, value: Any) -> None:
    write(good, tensors(), raw_header(model=MODEL | {key: value}))
    with contextlib.suppress(WeightsError):
        check_sound(*load_model(good))


@pytest.mark.parametrize("key", ["name", "arch", "model", "classes", "sigma_range", "patch"])
def test_header_fields_that_are_needed(good: Path, key: str) -> None:
    header = raw_header()
    del header[key]
    refused(write(good, tensors(), header), key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"x"',
        "{",
        "NaN",
        "[" * 10**5,
        '{"format_version": ' + "9" * 5000 + "}",
    ],
    ids=range(9),
)
def test_headers_that_are_no_objects(good: Path, text: str) -> None:
    refused(write(good, tensors(), text))


def test_class_names_match_the_network(good: Path) -> None:
    for names in ([], ["one"], ["one", "two", "three"], "ab"):
        refused(write(good, tensors(), raw_header(classes=names)), "classes")


@pytest.mark.parametrize("levels", [[-1, 1], [0.5, 0.1], [math.nan, 1], [0, math.inf], [0], 3])
def test_noise_levels_that_cannot_be(good: Path, levels: Any) -> None:
    refused(write(good, tensors(), raw_header(sigma_range=levels)))


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [3000]},  # 650 MB, which would be there, but the file does not have them
        {"widths": [10**12]},
        {"widths": [10**30]},
        {"widths": [2**15]},  # 38 GB a layer: too much for anyone, but no overflow
        {"widths": [2**15] * 4, "blocks": [9] * 4},
        {"widths": [4] * 10**5, "blocks": [1] * 10**5},
        {"blocks": [10**9]},
        {"blocks": [10**30]},
        {"head": 2**40},
        {"num_classes": 10**18},
        {"channels": 2**62},
        {"unshuffle": 10**9},
        {"side": 1e12},
        {"side": 1e300},
        {"side": math.nan},
        {"groups": 10**15, "norm": "group"},
        {"widths": [[4]]},
        {"widths": {"4": 4}},
        {"widths": "4"},
        {"widths": [4.0]},
        {"widths": [True]},
        {"norm": ["pixel"]},
        {"norm": None},
        {"down": "2"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_impossible_models_cost_nothing(good: Path, change: dict[str, Any]) -> None:
    write(good, tensors(), raw_header(model=MODEL | change))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(good)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{grown} KiB more"  # macOS counts bytes: stricter still
    assert time.monotonic() - started < 5
