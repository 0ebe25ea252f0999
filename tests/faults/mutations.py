"""Mutated bundles, sealed again and not, and mutated inputs: sentences, and nothing outside.

In the folder `outside` of a case lie files that nothing may open, and wherever Python code could be
picked up lies some that would leave a mark there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.cli import fuzz_inputs as inputs
from tests.faults.run import Case, World, run, silence
from tests.faults.watch import Watch

BUNDLES, INPUTS = 600, 400
_REFERENCES = 6  # the first changes by hand, to what a compile is recorded to have been asked for
_EVIL = "import os; open(os.environ['IQ_CANARY'], 'w').close()\n"
_SECRET = "the secret that nobody may read " * 40
Change = Callable[["Site"], object]


class Site:
    """The folder of a case: a bundle or inputs in `place`, traps in `outside` and `cwd`."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.box = world.box("mutations")
        self.place, self.outside = self.box / "place", self.box / "outside"
        self.ran = self.box / "ran"
        os.environ["IQ_CANARY"] = str(self.ran)
        (self.outside / "canary").write_text(_SECRET)
        (self.outside / "victim").mkdir()
        (self.outside / "victim" / "rtx-ampere.plan").write_text("mine")
        for name in ("pip", "torch", "json", "tensorrt_rtx", "sitecustomize", "transformers"):
            (self.box / "cwd" / f"{name}.py").write_text(_EVIL)

    @property
    def bundle(self) -> Path:
        return self.place / "b"

    def copy_bundle(self) -> None:
        """A whole bundle, with a work folder of its own if a case needs one."""
        self.ran.unlink(missing_ok=True)
        shutil.copytree(self.world.compiled("a") / "b", self.bundle, symlinks=True)

    def manifest(self) -> dict[str, Any]:
        """As it stands there."""
        found: dict[str, Any] = json.loads((self.bundle / "manifest.json").read_text())
        return found

    def write(self, manifest: Any) -> None:
        """Write it, as JSON or as it is."""
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (self.bundle / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")

    def record(self, *names: str) -> None:
        """The manifest says of these files what they are now."""
        manifest = self.manifest()
        for name in names:
            content = (self.bundle / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"bytes": len(content), "sha256": digest}
        self.write(manifest)

    def judged(self, argv: list[str], stdin: str = "") -> list[str]:
        """What is wrong with this command here."""
        watch = Watch(self.outside)
        done = run(self.box, argv, stdin=stdin)
        why = [*watch.close(), *done.complaints()]
        if self.ran.exists():
            why.append("runs code")
        return why


def code_folder(model: Path, folder: Path) -> None:
    """A copy of a model or tokenizer whose classes come with it, as `auto_map` says."""
    inputs.copy(model, folder)
    (folder / "evil.py").write_text(_EVIL)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M",
            "AutoTokenizer": ["evil.T", "evil.T"]}  # fmt: skip
    for name, kind in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, kind: "evil", "auto_map": auto}))


def cases(world: World, chosen: str | None = None) -> list[Case]:
    """Cases `mutations/bundle-N` and `mutations/input-N`; the first are chosen by hand."""
    bundles = [Case(f"mutations/bundle-{n}", partial(_bundle, world, n)) for n in range(BUNDLES)]
    others = [Case(f"mutations/input-{n}", partial(_input, world, n)) for n in range(INPUTS)]
    made = []
    for n in range(max(BUNDLES, INPUTS)):
        made += [*bundles[n : n + 1], *others[n : n + 1]]
    return made


def _bundle(world: World, number: int) -> list[str]:
    rng = world.rng(f"mutations/bundle-{number}")
    site = Site(world, rng)
    site.copy_bundle()
    if number < len(BY_HAND):
        BY_HAND[number](site)
        _seal(site)
    else:
        inputs.damage_bundle(rng, site.bundle)  # which seals it again, mostly
    out, repo = str(site.bundle), str(site.place / "repo")
    evaluate = ["eval", out, "--windows", "1", "--length", "16", "--no-speed", "--quiet", "--text",
                str(world.base / "other.txt")]  # fmt: skip
    commands = [
        ["inspect", out], ["inspect", out, "--json"], [*evaluate, "--bundle-only"],
        ["run", out, "--prompt", "hello", "--max-new-tokens", "2", "--quiet"],
        ["build", out, "--target", "rtx-ampere", "--quiet"],
        ["package", "--triton", out, repo, "--backend", "onnxruntime", "--quiet"],
        evaluate,
    ]  # fmt: skip
    rng.shuffle(commands)
    # Changes by hand: all of them; an eval that makes its references takes long. Others: one.
    if number < len(BY_HAND):
        chosen = [evaluate] * (number < _REFERENCES) + [c for c in commands if c is not evaluate]
    else:
        chosen = [next(c for c in commands if c is not evaluate)]
    why = _readers(site)
    for argv in chosen:
        why += site.judged(argv, stdin="y\n" * 20)
    return list(dict.fromkeys(why))


def _seal(site: Site) -> None:
    """The checksum is that of the manifest, unless the change was to put something else there."""
    manifest, seal = site.bundle / "manifest.json", site.bundle / "manifest.json.sha256"
    if manifest.is_file() and not seal.is_symlink():
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        seal.write_text(f"{digest}  manifest.json\n")


def _readers(site: Site) -> list[str]:
    """`verify` must end in a sentence, and agree with the C++ reader about the files."""
    why = site.judged(["verify", str(site.bundle), "--quiet"])
    if site.world.reader is None:
        return why
    watch = Watch(site.outside)
    try:
        checked = subprocess.run(
            [site.world.reader, site.bundle, "--check"], capture_output=True, text=True,
            errors="replace", check=False, timeout=silence(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [*why, "iq_run --check hangs"]
    why += [f"iq_run {what}" for what in watch.close()]
    if checked.returncode not in (0, 5, 6, 7):
        why.append(f"iq_run --check ends with {checked.returncode}")
    # 5: the bundle is whole, and no session of the runtime runs its graph.
    ours, theirs = _opened(site), checked.returncode in (0, 5)
    if ours != theirs:
        said = checked.stderr.strip().splitlines()[:2]
        why.append(f"Python {_verb(ours)}, iq_run {_verb(theirs)} {' '.join(said)[:200]}")
    return why


def _verb(accepts: bool) -> str:
    return "accepts" if accepts else "rejects"


def _opened(site: Site) -> bool:
    """Whether `iq_export.Bundle.open`, which checks every file but runs no graph, takes it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            from iq_export import Bundle

            Bundle.open(site.bundle)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _options(**changes: object) -> Change:
    """Recorded options of the compile are others."""

    def change(site: Site) -> None:
        code_folder(site.world.hugging_face(), site.bundle / "evil")
        manifest = site.manifest()
        values = {k: str(site.bundle / v) if v == "evil" else v for k, v in changes.items()}
        manifest["options"].update(values)
        site.write(manifest)

    return change


def _top(**changes: object) -> Change:
    """Fields of the manifest are others."""
    return lambda site: site.write({**site.manifest(), **changes})


def _graph(**changes: object) -> Change:
    """Fields of the graph are others."""

    def change(site: Site) -> None:
        manifest = site.manifest()
        site.write({**manifest, "graphs": [{**manifest["graphs"][0], **changes}]})

    return change


def _files(change: Callable[[dict[str, Any], Site], object]) -> Change:
    def apply(site: Site) -> None:
        manifest = site.manifest()
        manifest["files"] = change(manifest["files"], site) or manifest["files"]
        site.write(manifest)

    return apply


def _named(name: str) -> Change:
    """A file of that name is recorded, as the canary is."""

    def change(files: dict[str, Any], site: Site) -> None:
        secret = _SECRET.encode()
        outside = name.replace("OUTSIDE", str(site.outside))
        files[outside] = {"bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}

    return _files(change)


def _without(name: str) -> Change:
    """A file is neither there nor recorded."""

    def change(site: Site) -> None:
        manifest = site.manifest()
        del manifest["files"][name]
        site.write(manifest)
        (site.bundle / name).unlink()

    return change


def _link(name: str, to: str, *, same: bool = True) -> Change:
    """A file or folder of the bundle is a link to `outside`, with the same content if wanted."""

    def change(site: Site) -> None:
        path, target = site.bundle / name, site.outside / to
        if path.is_dir():
            if same:
                shutil.copytree(path, target, dirs_exist_ok=True)
            shutil.rmtree(path)
        elif path.exists():
            if same:
                shutil.copyfile(path, target)
            path.unlink()
        path.symlink_to(target)

    return change


def _content(name: str, content: str | bytes) -> Change:
    """A file has other content, and is recorded with it."""

    def change(site: Site) -> None:
        path = site.bundle / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if name != "manifest.json":
            site.record(name)

    return change


def _pipe(name: str) -> Change:
    """A file is a pipe."""

    def change(site: Site) -> None:
        (site.bundle / name).unlink()
        os.mkfifo(site.bundle / name)

    return change


def _external(location: str) -> Change:
    """The graph's weights lie in another file."""

    def change(site: Site) -> None:
        import onnx

        path = site.bundle / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location.replace("OUTSIDE", str(site.outside))
        path.write_bytes(model.SerializeToString())
        data = site.bundle / "model.onnx.data"
        shutil.copyfile(data, site.outside / "data")
        site.record("model.onnx")

    return change


_DEEP = '{"format_version": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
_ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e"
BY_HAND: tuple[Change, ...] = (
    _options(model="evil", trust_remote_code=True),
    _link("engines", "victim", same=False),
    _options(tokenizer="evil", trust_remote_code=True),
    _options(model="evil"),
    _options(tokenizer="evil"),
    _options(trust_remote_code="yes", accept_terms=True, nonsense=1),
    _top(files={}),
    _named("../../outside/canary"),
    _named("OUTSIDE/canary"),
    _without("model.onnx.data"),
    _top(recipe=_ESCAPES, name=_ESCAPES, notes=[_ESCAPES], targets=[_ESCAPES]),
    _link("report.html", "report.html"),
    _link("model.onnx.data", "data"),
    _external("../../outside/data"),
    _external("OUTSIDE/data"),
    _link("engines", "engines"),
    _link("plan.json", "plan.json"),
    _link("manifest.json", "manifest.json"),
    _link("manifest.json.sha256", "seal"),
    _link("tokenizer.json", "tokenizer.json"),
    _top(a_field_of_later=[1, {"x": None}]),
    _named("./model.onnx"),
    _named("engines//x"),
    _named("engines/../model.onnx"),
    _named("a\\b"),
    _named("a\nb\x1b[31m"),
    _named("n" * 300),
    _named(""),
    _named("."),
    _without("model.onnx"),
    _without("plan.json"),
    _without("tokenizer.json"),
    _without("report.html"),
    lambda site: site.write(_DEEP),
    lambda site: site.write({**site.manifest(), "options": json.loads("[" * 900 + "]" * 900)}),
    _top(opset=10**400),
    lambda site: site.write(json.dumps(site.manifest()).replace('"opset": 23', '"opset": 1e999')),
    _top(format_version=True),
    _top(format_version=1.0),
    _top(format_version=3),
    _top(format_version=1),
    _top(graphs=[]),
    _top(graphs={"model": {}}),
    _top(graphs=[{}] * 100_000),
    lambda site: site.write({**site.manifest(), "graphs": site.manifest()["graphs"] * 2}),
    _graph(name="../../outside/canary"),
    _graph(name="other"),
    _graph(name=_ESCAPES),
    _top(peak_rss_bytes=-(10**30)),
    _graph(profile={"batch": {"min": 10**30, "opt": -1, "max": "x"}}),
    _graph(engines={"../../outside/victim/x": {}}),
    _graph(engines={"rtx-ampere": {"bytes": "many", "form": _ESCAPES}}),
    _top(targets=["../../outside/victim/rtx-ampere"]),
    _graph(inputs=[{"name": "input_ids", "dtype": "int64", "shape": [10**30]}]),
    _graph(lifecycles=[{"birth": "x"}, {}]),
    _top(check={"tokens": [], "top1": "x", "kl": None}),
    _top(accuracy={"rows": 5}, speed={"x": 1}),
    _top(timings={"x": "y"}),
    _top(source=[]),
    _pipe("plan.json"),
    _pipe("model.onnx.data"),
    _pipe("manifest.json"),
    _pipe("report.html"),
    _content("plan.json", "[" * 100_000),
    _content("plan.json", json.dumps({"lifecycles": [{}], "sites": 5})),
    _content("config.json", json.dumps({"max_position_embeddings": 10**400})),
    _content("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
    _content("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    _content("sinks.safetensors", b"\xff" * 16),
    _content("model.onnx", b"\x08\x07"),
    lambda site: (site.bundle / "manifest.json").write_bytes(b"\xff\xfe{}"),
)


def _input(world: World, number: int) -> list[str]:
    rng = world.rng(f"mutations/input-{number}")
    site = Site(world, rng)
    out = str(site.place / "out")
    small = ["--samples", "1", "--length", "16", "--insertion", "norm", "--recipe", "fp16",
             "--quiet", "--target", "h100"]  # fmt: skip
    if number < len(INPUTS_BY_HAND):
        argv = INPUTS_BY_HAND[number](site)
        return site.judged([*argv[:2], out, *argv[2:], *small], stdin="y\n" * 20)
    kind = rng.choice(("folder", "gguf", "onnx", "onnx", "tokenizer", "text"))
    model = world.base / "a"
    if kind in ("folder", "gguf"):
        model = world.hugging_face() if kind == "folder" else world.gguf()
    copied = inputs.copy(model, site.place / model.name)
    words = [str(copied)]
    text = site.place / "text.txt"
    shutil.copyfile(world.base / "text.txt", text)
    if kind in ("onnx", "tokenizer", "text"):
        tokenizer = inputs.copy(world.base / "tokenizer", site.place / "tokenizer")
        words = [str(copied / "model.onnx"), "--tokenizer", str(tokenizer)]
    if kind == "folder":
        inputs.damage_model(rng, copied)
    elif kind == "gguf":
        inputs.damage_file(rng, copied)
    elif kind == "onnx":
        inputs.damage_file(rng, rng.choice([*sorted(copied.iterdir()), copied / "model.onnx"]))
    elif kind == "tokenizer":
        inputs.damage_model(rng, tokenizer)
    elif rng.random() < 0.7:
        text.write_bytes(rng.choice(inputs.TEXTS))
    else:
        words += ["--calibration", inputs.odd_path(rng, site.place)]
    argv = ["compile", words[0], out, *words[1:], "--calibration", str(text), *small]
    # A trace of a folder or a GGUF file takes many seconds.
    if kind in ("folder", "gguf") and rng.random() < 0.9:
        argv.append("--dry-run")
    return site.judged(argv, stdin="y\n" * 20)


def _evil_model(site: Site) -> list[str]:
    code_folder(site.world.hugging_face(), site.place / "m")
    return ["compile", str(site.place / "m")]


def _evil_tokenizer(site: Site) -> list[str]:
    code_folder(site.world.base / "tokenizer", site.place / "t")
    return ["compile", str(site.world.base / "a/model.onnx"), "--tokenizer", str(site.place / "t")]


def _evil_tokenizer_alone(site: Site) -> list[str]:
    """It has no tokenizer.json: its own class would have to make one."""
    code_folder(site.world.base / "tokenizer", site.place / "t")
    (site.place / "t" / "tokenizer.json").unlink()
    return ["compile", str(site.world.base / "a/model.onnx"), "--tokenizer", str(site.place / "t")]


def _pip(site: Site) -> list[str]:
    """Its download runs pip; in the current folder stands another."""
    return ["compile", "smollm2-135m"]


def _linked(name: str, *, tokenizer: bool = False) -> Callable[[Site], list[str]]:
    """A file of the model's or tokenizer's folder is a link to `outside`."""

    def change(site: Site) -> list[str]:
        source = site.world.base / ("tokenizer" if tokenizer else "a")
        folder = inputs.copy(source, site.place / "m")
        target = site.outside / "moved"
        if (folder / name).exists():
            shutil.move(folder / name, target)
        else:
            target.write_text(_SECRET)
        (folder / name).symlink_to(target)
        if tokenizer:
            return ["compile", str(site.world.base / "a/model.onnx"), "--tokenizer", str(folder)]
        words = ["--tokenizer", str(site.world.base / "tokenizer")]
        return ["compile", str(folder / "model.onnx"), *words]

    return change


def _linked_folder(name: str) -> Callable[[Site], list[str]]:
    def change(site: Site) -> list[str]:
        folder = inputs.copy(site.world.hugging_face(), site.place / "m")
        (site.outside / "moved").write_text(_SECRET)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(site.outside / "moved")
        return ["compile", str(folder)]

    return change


def _located(location: str) -> Callable[[Site], list[str]]:
    """The weights of an ONNX file lie elsewhere."""

    def change(site: Site) -> list[str]:
        import onnx

        folder = inputs.copy(site.world.base / "a", site.place / "m")
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location.replace("OUTSIDE", str(site.outside))
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        data = next(path for path in (site.world.base / "a").iterdir() if path.suffix != ".onnx")
        shutil.copyfile(data, site.outside / "data")
        words = ["--tokenizer", str(site.world.base / "tokenizer")]
        return ["compile", str(folder / "model.onnx"), *words]

    return change


def _pickle(site: Site) -> list[str]:
    """Weights that run code when they are unpickled."""
    folder = inputs.copy(site.world.hugging_face(), site.place / "m")
    (folder / "model.safetensors").unlink()
    code = f"cbuiltins\nexec\n(V{_EVIL.strip()}\ntR."
    (folder / "pytorch_model.bin").write_bytes(code.encode())
    return ["compile", str(folder)]


def _piped(which: str) -> Callable[[Site], list[str]]:
    """A pipe that nobody writes to, as an input."""

    def change(site: Site) -> list[str]:
        os.mkfifo(site.place / "pipe.onnx")
        pipe = str(site.place / "pipe.onnx")
        model = pipe if which == "model" else str(site.world.base / "a/model.onnx")
        tokenizer = pipe if which == "tokenizer" else str(site.world.base / "tokenizer")
        words = ["compile", model, "--tokenizer", tokenizer]
        return [*words, "--calibration", pipe] if which == "text" else words

    return change


def _config(**changes: object) -> Callable[[Site], list[str]]:
    def change(site: Site) -> list[str]:
        folder = inputs.copy(site.world.hugging_face(), site.place / "m")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return ["compile", str(folder)]

    return change


INPUTS_BY_HAND: tuple[Callable[[Site], list[str]], ...] = (
    _evil_model,
    _evil_tokenizer,
    _evil_tokenizer_alone,
    _pip,
    _linked("LICENSE"),
    _linked("LICENSE", tokenizer=True),
    _linked("tokenizer.json", tokenizer=True),
    _linked("tokenizer_config.json", tokenizer=True),
    _linked_folder("LICENSE"),
    _linked_folder("NOTICE"),
    _linked_folder("generation_config.json"),
    _linked("model.onnx.data"),
    _located("../../outside/data"),
    _located("OUTSIDE/data"),
    _pickle,
    _piped("model"),
    _piped("tokenizer"),
    _piped("text"),
    _config(num_hidden_layers=-1),
    _config(num_hidden_layers=10**400),
    _config(hidden_size=[1]),
    _config(rope_parameters={"rope_type": [], "rope_theta": "x"}),
    _config(torch_dtype="nonsense"),
    _config(vocab_size=None),
    _config(head_dim=0),
    _config(architectures=[_ESCAPES]),
    _config(model_type=_ESCAPES),
    _config(max_position_embeddings="many"),
)
