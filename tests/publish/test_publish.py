"""Published on a stand-in of the hub, loaded and drawn from; what the card says, and what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

import dinogen
from dinogen import hub
from dinogen.config import ConfigError, load_config, parse_config
from dinogen.publish.publish import (
    FILES,
    Publication,
    public_config,
    publish,
    write_publication,
)
from dinogen.serve.app import make_app
from dinogen.serve.gallery import Gallery
from dinogen.training.checkpointing.export import export
from dinogen.training.checkpointing.exported import open_exported
from tests.formats.unet_runs import random_run
from tests.hub_server import hub_server, use_hub

NAME = "someone/faces"
ADDRESS = hub.Address(NAME)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server() as found:
        use_hub(monkeypatch, found, tmp_path / "home")
        yield found


def repository(server, name=NAME):
    return server.repositories[f"models/{name}"]


def test_publish_load_and_sample_in_three_commands(run, server, tmp_path):
    """On the machine that samples there is nothing but the package."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    done = server.dinogen(
        *("publish", run, "hf://someone/faces", "--licence", "cc-by-nc-4.0", "--private"),
        home=tmp_path / "a",
        cwd=there,
    )
    assert done.returncode == 0, done.stderr
    commit = repository(server).branches["main"]
    assert f"{server.url}/someone/faces: commit {commit}" in done.stdout
    assert "replaces" not in done.stdout
    assert repository(server).private

    code = "import dinogen; print(dinogen.load_generator('hf://someone/faces').sample(2).shape)"
    done = server.python("-c", code, home=tmp_path / "b", cwd=here)
    assert done.stdout.strip() == "torch.Size([2, 3, 8, 8])", done.stderr
    done = server.dinogen("sample", "hf://someone/faces", "--num", 4, home=tmp_path / "b", cwd=here)
    assert done.returncode == 0, done.stderr
    folder = here / f"someone--faces-{commit[:7]}"
    assert len(list(folder.rglob("0000?*.png"))) == 4


def test_what_is_published_is_the_moving_average_of_the_run(run, evaluation, server):
    done = publish(Publication(run, ADDRESS, licence="mit"))
    files = repository(server).commits[done.commit]
    assert set(files) == {*FILES, ".gitattributes"}
    ours, theirs = dinogen.load_generator(run), dinogen.load_generator("hf://someone/faces")
    assert torch.equal(ours.sample(3, seed=5), theirs.sample(3, seed=5))
    assert theirs.info["card"]["licence"] == "mit"
    assert len(repository(server).messages) == 2  # the hub's first one, and ours
    assert repository(server).messages[-1] == f"guided 8x8 at {theirs.info['nimg']} images"


def test_a_page_that_draws_from_the_hub(run, server):
    done = publish(Publication(run, ADDRESS))
    gallery = Gallery(Path("hf://someone/faces"))
    assert list(gallery.stages) == [8]
    page = TestClient(make_app(gallery, ["*"])).get("/").text
    assert f"someone--faces-{done.commit[:7]}" in page
    assert str(server.url) not in page


def test_published_again_it_is_one_commit_that_replaces(run, evaluation, server):
    first = publish(Publication(run, ADDRESS))
    assert first.before is None
    assert publish(Publication(run, ADDRESS)) == hub_state(first, before=first.commit)
    notes = {"NOTES.md": b"of somebody else"}
    old = repository(server).commits[first.commit]
    changed = repository(server).commit(old | notes)
    evaluation.unlink()
    second = publish(Publication(run, ADDRESS), message="again")
    assert second.before == changed
    assert second.commit != changed
    assert len(repository(server).messages) == 4
    assert repository(server).messages[-1] == "again"
    files = set(repository(server).commits[second.commit])
    assert files == {*FILES, ".gitattributes", "NOTES.md"} - {"evaluation.json"}
    assert hub.fetch(hub.parse(f"hf://someone/faces@{first.commit}")).commit == first.commit


def hub_state(published, before):
    return type(published)(published.url, published.commit, before)


def test_on_a_branch_of_its_own(run, server):
    publish(Publication(run, ADDRESS))
    main = repository(server).branches["main"]
    done = publish(Publication(run, hub.parse("hf://someone/faces@try"), resolution=4))
    assert repository(server).branches == {"main": main, "try": done.commit}
    assert dinogen.load_generator("hf://someone/faces").info["resolution"] == 8
    assert dinogen.load_generator("hf://someone/faces@try").info["resolution"] == 4


def test_the_card(run, evaluation, tmp_path):
    facts = write_publication(Publication(run, ADDRESS), tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "dinogen"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == "unknown"
    assert {"dinogen", "guided", "8x8", "random-guide", "dinov2"} <= set(card.data.tags)
    # Of a random feature extractor no value is given to the hub, and the card says it.
    assert [one.metric_type for one in card.data.eval_results] == ["spectrum"]
    assert card.data.eval_results[0].metric_value == 4.5
    assert "| spectrum | 4.5 ± 0.2 | lower | 60 images against 50 of val | `aaaaaaaaaaaa` |" in text
    assert "Caution, fid: measured by a RANDOM feature extractor" in text
    assert "Caution, spectrum: few" in text
    assert "RANDOM GUIDE" in text
    assert "No licence is stated" in text
    assert str(facts.info["data"])[:12] in text
    assert f"| `{facts.info['guide']['weights_sha256'][:12]}` **RANDOM** |" in text
    assert 'dinogen.load_generator("hf://someone/faces")' in text
    assert "](samples.png)" in text


@pytest.mark.parametrize(
    ("licence", "name"), [("MIT", "mit"), ("Only for friends | of mine", "other")]
)
def test_licences(run, tmp_path, licence, name):
    write_publication(Publication(run, ADDRESS, licence=licence), tmp_path / "card")
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    assert card.data.license == name
    assert f"{licence}, for the weights." in card.text
    assert "No licence" not in card.text


def test_nothing_of_this_machine_is_told(run, evaluation, tmp_path):
    folder = tmp_path / "card"
    write_publication(Publication(run, ADDRESS, licence="mit"), folder)
    info = open_exported(folder / "model.safetensors").info
    told = [json.dumps(info)]
    told += [(folder / name).read_text() for name in ("README.md", "config.yaml")]
    told.append((folder / "evaluation.json").read_text())
    for text in told:
        assert str(tmp_path.parent) not in text
        assert "/tmp" not in text
        assert "account-of-the-lab" not in text
    measured = json.loads((folder / "evaluation.json").read_text())["measured"]
    command = measured["spectrum"]["command"]
    assert command == "dinogen evaluate run metrics.inception=a.pth https://x.org/y"
    assert measured["fid"]["command"] == "dinogen evaluate run 'data.path=my faces'"
    assert load_config(folder / "config.yaml").data.path == "discs"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/me/a.pth", "a.pth"),
        ("~/a/b", "b"),
        ("../../data/faces", "faces"),
        ("--reference=/mnt/x y", "--reference=x y"),
        ("--reference=/mnt/x y/z", "--reference=z"),
        ("data/faces", "data/faces"),
        ("lr / batch, fid/kid, 3/4", "lr / batch, fid/kid, 3/4"),
        ("https://x.org/y/z hf://datasets/a/b", "https://x.org/y/z hf://datasets/a/b"),
        ("hf://a/b@v1/c", "hf://a/b@v1/c"),
        ("hf:/a/b@v1/c", "hf:/a/b@v1/c"),
        ("at http://me:pw@mlflow.lab:5000/x", "at http://mlflow.lab:5000/x"),
        ("s3://KEY:SE/CR+ET@bucket/x", "s3://bucket/x"),
        ("http://me:p?w@lab/x", "http://lab/x"),
        ("https://h:80/x@y?token=a#b", "https://h:80/x@y"),
        ("file:///home/me/x", "x"),
        ("ssh://me@host/home/me/x/", "x"),
        ("/home/Doe, Jane/x", "x"),
        ("--reference='/home/me/x'", "--reference='x'"),
        ("mount:/home/me/x", "mount:x"),
        ("/a/b/", "b"),
        ("see ~/a//b/ too", "see b/ too"),
        ("/", "/"),
    ],
)
def test_paths_are_shortened(text, told):
    config = parse_config({"notes": {"next": text}})
    assert public_config(config, ADDRESS).notes.next == told


def test_passwords_stay_here(run, tmp_path):
    """Neither in the config, nor in the metadata of the weights; commands of a shell are read."""
    state = next((run / "8x8" / "checkpoints").glob("*/state.json"))
    found = json.loads(state.read_text())
    found["config"]["logging"] = [{"mlflow": {"tracking_uri": "http://me:pw@mlflow.lab:5000"}}]
    found["config"]["data"]["path"] = "/home/Doe, Jane/faces/"
    found["config"]["init_from"] = "../before/"
    state.write_text(json.dumps(found))
    facts = write_publication(Publication(run, ADDRESS), tmp_path / "card")
    assert facts.config.data.path == "faces"
    assert facts.config.init_from == "before"
    for file in ("config.yaml", "model.safetensors", "README.md"):
        told = (tmp_path / "card" / file).read_bytes()
        assert not any(word in told for word in (b"mlflow", b"pw@", b"Jane", b"/tmp", b"account-"))


def test_a_dry_run_asks_nobody(run, server, tmp_path):
    done = server.dinogen(
        *("publish", run, "hf://someone/faces", "--dry-run", "card"),
        home=tmp_path / "home",
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    assert "NO LICENCE" in done.stderr
    assert server.requests == []
    assert {one.name for one in (tmp_path / "card").iterdir()} <= set(FILES)
    grid = (tmp_path / "card" / "samples.png").read_bytes()
    assert grid.startswith(b"\x89PNG")
    metadata = (tmp_path / "card" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(metadata)["library_name"] == "dinogen"


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"mine: holds thesis\.tex too: give a new or an empty"):
        write_publication(Publication(run, ADDRESS), tmp_path / "mine")


@pytest.mark.parametrize("name", FILES)
def test_files_of_ones_own_are_left_alone(run, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("of mine")
    with pytest.raises(ConfigError, match=rf"mine: holds {name}, and no model\.safetensors of"):
        write_publication(Publication(run, ADDRESS), tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_text() == "of mine"
    with pytest.raises(ConfigError, match=rf"{name}: is a file: give a new or an empty folder"):
        write_publication(Publication(run, ADDRESS), tmp_path / "mine" / name)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://datasets/someone/faces", "a generator gets a repository"),
        ("hf://someone/faces/G.safetensors", "a generator gets a repository"),
        (f"hf://someone/faces@{'0' * 40}", "a commit cannot change: name a branch"),
    ],
)
def test_where_nothing_can_be_published(run, tmp_path, address, said):
    with pytest.raises(hub.HubError, match=said):
        write_publication(Publication(run, hub.parse(address)), tmp_path / "card")


def test_each_refusal_of_the_hub_is_one_line(run, server, tmp_path, monkeypatch):
    def refused(address: hub.Address = ADDRESS, private: bool = False) -> str:
        with pytest.raises(hub.HubError) as caught:
            publish(Publication(run, address), private)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    server.add(NAME, {})
    assert "--private, but this repository is public already" in refused(private=True)
    said = refused(hub.Address("somebody-else/faces"))
    assert "nothing was published: the hub does not let you write to somebody-else/faces" in said
    assert "log in with `hf auth login`, or set HF_TOKEN" in said
    server.fault = lambda request: 500 if "/commit/" in request else None
    assert f"nothing was published: the hub at {server.url} failed (Server error '500" in refused()
    assert len(repository(server).messages) == 1
    server.fault = lambda request: None
    use_hub(monkeypatch, server, tmp_path / "stranger", token=None)
    assert "nothing was published" in (said := refused())
    assert "log in with `hf auth login`" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused()


@pytest.mark.parametrize("section", ["guide", "family"])
def test_code_of_ones_own_is_refused(run, tmp_path, section):
    config = run / "config.yaml"
    found = yaml.safe_load(config.read_text())
    found[section] = {"file": "/home/me/mine.py"}
    config.write_text(yaml.safe_dump(found))
    with pytest.raises(ConfigError, match=rf"^{section}\.file: /home/me/mine\.py is on this"):
        write_publication(Publication(run, ADDRESS), tmp_path / "card")


@pytest.mark.parametrize("section", ["guide", "family"])
def test_code_that_a_file_from_the_hub_names_is_not_run(run, server, tmp_path, section):
    """Neither by the file's address, nor by where it lies in the cache."""
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    write_publication(Publication(run, ADDRESS), tmp_path / "card")
    file = tmp_path / "card" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["dinogen"])
    info["config"][section] = {"file": str(code)}
    save_file(load_file(file), file, {"dinogen": json.dumps(info)})
    server.add(NAME, {"model.safetensors": file.read_bytes()})
    for path in ("hf://someone/faces", hub.local_weights("hf://someone/faces")):
        with pytest.raises(ConfigError, match=rf"{section}\.file names Python code, .*mine\.py"):
            dinogen.load_generator(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("section", ["guide", "family"])
def test_code_that_a_run_from_the_hub_names_is_not_run(run, server, tmp_path, section, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the folder of links
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    config = run / "config.yaml"
    found = yaml.safe_load(config.read_text())
    found[section] = {"file": str(code)}
    config.write_text(yaml.safe_dump(found))
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    server.add(NAME, files)
    for path in ("hf://someone/faces", hub.working_path("hf://someone/faces")):
        with pytest.raises(ConfigError, match=rf"{section}\.file names Python code, .*mine\.py"):
            dinogen.load_generator(path)
    assert not (tmp_path / "ran").exists()


def test_an_exported_file_is_published_as_its_run_is(run, tmp_path):
    done = write_publication(Publication(run, ADDRESS), tmp_path / "card")
    assert done.num_parameters > 0
    file = tmp_path / "card" / "model.safetensors"
    write_publication(Publication(file, ADDRESS), tmp_path / "again")
    one, other = (
        load_file(folder / "model.safetensors") for folder in (file.parent, tmp_path / "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_exported_file_brings_its_card(run, evaluation, tmp_path, caplog):
    file = tmp_path / "first.safetensors"
    export(run, file, licence="mit", intended_use="art only")
    assert write_publication(Publication(file, ADDRESS), tmp_path / "card").licence == "mit"
    text = (tmp_path / "card" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert "Art only." in text
    assert "No licence" not in text
    assert "NO LICENCE" not in caplog.text
    assert [one.metric_type for one in card.data.eval_results] == ["spectrum"]
    assert "| spectrum | 4.5 ± 0.2 | lower | 60 images against 50 of val | `aaaaaaaaaaaa` |" in text
    assert "Caution, fid: measured by a RANDOM feature extractor" in text
    assert "evaluation.json" not in text
    other = Publication(file, ADDRESS, licence="cc0-1.0", intended_use="All.")
    write_publication(other, tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert ModelCard(text).data.license == "cc0-1.0"
    assert "All.\n" in text

    # as it was written before the card said what was random
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["dinogen"])
    for one in info["card"]["metrics"].values():
        del one["random"], one["better"], one["split"]
    save_file(load_file(file), file, {"dinogen": json.dumps(info)})
    write_publication(Publication(file, ADDRESS), tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert "Caution, spectrum, fid: the file does not say whether" in text


@pytest.mark.parametrize("file", ["cats.pt", f"hf://other/cats@{'0' * 40}/unet.pt"])
def test_the_card_of_imported_weights_says_where_they_are_from(tmp_path, file, caplog):
    run = random_run(tmp_path / "run")
    state = next((run / "8x8" / "checkpoints").glob("*/state.json"))
    found = json.loads(state.read_text())
    found["facts"]["imported"] = {"kind": "diffusers", "file": file, "sha256": "ab" * 32}
    state.write_text(json.dumps(found))
    exported = tmp_path / "G.safetensors"
    export(run, exported)
    for source in (run, exported):
        what = Publication(source, ADDRESS, licence="mit")
        facts = write_publication(what, tmp_path / "card")
        assert facts.info["card"]["data"] == f"not known: imported from {file}"
        text = (tmp_path / "card" / "README.md").read_text()
        said = f"imported from `{file}` (diffusers, SHA-256 `{'ab' * 32}`) and not trained with"
        assert said in text
        assert "images shown" not in text
        assert "## Data" not in text
        assert "data/faces" not in text
        assert "## Training" not in text
        assert "the licence of their source applies" in text
        assert f"the licence of {file} applies" in caplog.text
        assert ModelCard(text).data.base_model == ("other/cats" if "/" in file else None)


def test_code_of_ones_own_in_the_checkpoint_is_refused(run, tmp_path):
    """A config.yaml of today does not hide it, and an exported file is refused as its run is."""
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    section = {"file": str(tmp_path / "mine.py")}
    file = tmp_path / "first.safetensors"
    export(run, file)
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["dinogen"])
    info["config"]["guide"] = section
    save_file(load_file(file), file, {"dinogen": json.dumps(info)})
    state = next((run / "8x8" / "checkpoints").glob("*/state.json"))
    found = json.loads(state.read_text())
    found["config"]["guide"] = section
    state.write_text(json.dumps(found))
    for source in (file, run):
        with pytest.raises(ConfigError, match=r"guide\.file: .*mine\.py is on this machine alone"):
            write_publication(Publication(source, ADDRESS), tmp_path / "card")
        assert not (tmp_path / "card").exists()
