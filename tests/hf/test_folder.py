"""What is wrong with a Hugging Face folder is told in one sentence, tensors by name."""

import errno
import json

import numpy as np
import pytest
from cases import CASES, save
from fake import shapes_of

from jaxlm import stored
from jaxlm.checkpoint import storage
from jaxlm.convert import beside_adapter, from_hf, to_hf
from jaxlm.hf import folder, kept, tensors


@pytest.fixture
def llama(tmp_path):
    """A folder that is right, and a function that writes its tensors anew from changed shapes."""
    path, shapes = tmp_path / "hf", shapes_of(CASES["llama"])
    save(path, CASES["llama"], shapes)

    def change(**others):
        for old in path.glob("*.safetensors*"):
            old.unlink()
        changed = {n: s for n, s in (shapes | others).items() if s is not None}
        layout = {name: (shape, np.dtype(np.float32)) for name, shape in changed.items()}
        with tensors.Writer(path, layout, 10**9) as writer:
            for name, (shape, _) in layout.items():
                writer.put(name, np.zeros(shape, np.float32))

    return path, change


def refusal(path, out):
    with pytest.raises(ValueError, match=r"\w") as error:
        from_hf(path, out, say=lambda text: None)
    assert not out.exists()
    assert list(out.parent.glob(f".{out.name}*")) == [], "half-written output is left"
    return str(error.value)


def edit(path, **keys):
    config = json.loads((path / "config.json").read_text()) | keys
    (path / "config.json").write_text(json.dumps(config))


def test_missing_unknown_and_misshapen_tensors_are_named(llama, tmp_path):
    path, change = llama
    change(
        **{
            "model.norm.weight": None,
            "model.layers.0.mlp.odd.weight": (3,),
            "model.layers.1.mlp.up_proj.weight": (3, 4),
        }
    )
    said = refusal(path, tmp_path / "out")
    assert "missing: model.norm.weight" in said
    assert "without a place in the model: model.layers.0.mlp.odd.weight" in said
    assert "model.layers.1.mlp.up_proj.weight [3, 4] instead of [48, 32]" in said


def test_known_harmless_tensors_do_not_matter(llama, tmp_path):
    path, change = llama
    change(**{"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    from_hf(path, tmp_path / "out", say=lambda text: None)
    assert (tmp_path / "out" / "model.json").is_file()


def test_the_head_of_a_tied_model_may_be_stored_once_more_but_not_another_one(tmp_path):
    config = CASES["llama, tied, one KV head"]
    shapes = shapes_of(config)
    table = shapes["model.embed_tokens.weight"]
    save(tmp_path / "odd", config, shapes | {"lm_head.weight": table})
    assert "without a place in the model: lm_head.weight" in refusal(
        tmp_path / "odd", tmp_path / "out"
    )
    source = folder.open_folder(tmp_path / "odd")
    same = source.tensors | {"lm_head.weight": source.tensors["model.embed_tokens.weight"]}
    from jaxlm.checkpoint.digest import named
    from jaxlm.convert import _shapes
    from jaxlm.params import of_layers

    wanted = of_layers(named(_shapes(source.options)))
    folder.matched(source._replace(tensors=same), wanted, source.options)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "bert"}, "architecture 'bert', which is not known here; known are"),
        ({"hidden_size": None}, "hidden_size=null, where a whole number"),
        ({"hidden_act": "relu"}, 'hidden_act="relu", a nonlinearity that is not known'),
        ({"quantization_config": {"quant_method": "gptq"}}, "are quantized (gptq)"),
        ({"rope_scaling": {"type": "odd", "factor": 2.0}}, 'rope_type="odd"'),
    ],
)
def test_a_config_that_we_cannot_be_is_refused(llama, tmp_path, keys, said):
    path, _ = llama
    edit(path, **keys)
    assert said in refusal(path, tmp_path / "out")


def test_an_adapter_names_the_model_that_the_run_started_from(tmp_path):
    start = lambda hf, own: beside_adapter({"init.hf": hf, "init.checkpoint": own}, tmp_path)
    assert start("llama", "") == ("llama", "The model is that of llama.")
    base, said = start("", "my runs/sft")
    assert base == "my runs/sft"
    assert "convert to-hf 'my runs/sft' BASE" in said
    base, said = start("", "")
    assert base == ""
    assert f"to-hf {tmp_path} OUT" in said


def test_a_file_and_a_folder_of_the_other_kind_are_told(llama, tmp_path):
    path, _ = llama
    with pytest.raises(ValueError, match=rf"config.json is a file; name the folder .*: {path}$"):
        stored.look(path / "config.json")
    with pytest.raises(ValueError, match=r"seen from .*hf download OWNER/NAME --local-dir 'my x'"):
        stored.look("my x")
    with pytest.raises(ValueError, match="is a Hugging Face folder already"):
        to_hf(path, tmp_path / "out")
    from_hf(path, tmp_path / "ours", say=lambda text: None)
    said = refusal(tmp_path / "ours", tmp_path / "out")
    assert "what jaxlm wrote: use it as it is, or write one with to-hf" in said


def test_no_folder_no_config_no_tensors_pickles(llama, tmp_path):
    path, _ = llama
    out = tmp_path / "out"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"from-hf BASE OUT --adapter=.*adapter"):
        stored.look(tmp_path / "adapter")
    said = refusal(tmp_path / "nowhere", out)
    assert "there is no folder" in said
    assert "hf download OWNER/NAME --local-dir" in said
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "pytorch_model.bin, which is read by running code" in refusal(path, out)
    (path / "pytorch_model.bin").unlink()
    assert "holds no tensors" in refusal(path, out)
    (path / "config.json").write_text("{")
    assert "config.json is not readable" in refusal(path, out)
    (path / "config.json").unlink()
    assert "no config.json" in refusal(path, out)


def test_a_truncated_file_a_missing_shard_and_a_wrong_index_are_refused(tmp_path):
    path, out = tmp_path / "hf", tmp_path / "out"
    save(path, CASES["llama"], shapes_of(CASES["llama"]), shard_bytes=20_000)
    first, second, *_ = sorted(path.glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-5])
    assert f"{first.name} is cut off" in refusal(path, out)
    first.unlink()
    assert f"lacks {first.name}" in refusal(path, out)
    first.write_bytes(second.read_bytes())
    assert "names tensors that their files do not hold" in refusal(path, out)
    (path / folder.INDEX).unlink()
    assert f"but no {folder.INDEX}" in refusal(path, out)


def test_an_index_decides_which_file_a_tensor_is_from(tmp_path):
    path = tmp_path / "hf"
    save(path, CASES["llama"], shapes_of(CASES["llama"]), shard_bytes=20_000)
    index = json.loads((path / folder.INDEX).read_text())
    (name, place), other = next(iter(index["weight_map"].items())), "model-copy.safetensors"

    def says(file):
        changed = index["weight_map"] | {name: file}
        (path / folder.INDEX).write_text(json.dumps({"weight_map": changed}))

    (path / other).write_bytes((path / place).read_bytes())
    says(other)
    assert folder.open_folder(path).tensors[name].file.name == other
    says(next(file for file in index["weight_map"].values() if file != place))
    said = refusal(path, tmp_path / "out")
    assert f"that their files do not hold: {name} (" in said
    for odd in (3, None, [place]):
        says(odd)
        assert "not readable as an index" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize("kind", [3, None, ["F32"]])
def test_a_header_whose_dtype_is_no_text_is_unreadable(llama, tmp_path, kind):
    file = llama[0] / "model.safetensors"
    header = json.dumps({"a": {"dtype": kind, "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "its header is unreadable" in refusal(llama[0], tmp_path / "out")


def test_code_of_the_model_s_own_is_never_run(llama, tmp_path):
    path, _ = llama
    edit(path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, my_key=3)
    (path / "modeling_own.py").write_text("raise SystemExit('run')")
    notes = []
    from_hf(path, tmp_path / "out", say=notes.append)
    assert any("is not run" in note for note in notes)
    assert any("no meaning here: my_key" in note for note in notes)


def test_what_exists_is_not_written_over(llama, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        from_hf(llama[0], tmp_path / "out", say=lambda text: None)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']"),  # as Orbax has it
        OSError(errno.ENOSPC, "No space left on device", "elsewhere"),
    ],
)
def test_a_full_disk_is_told_by_the_folder_that_was_asked_for(llama, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(storage, "start", full)
    said = refusal(llama[0], tmp_path / "out")
    assert said.startswith(f"{tmp_path / 'out'} could not be written: No space left on device")


@pytest.mark.parametrize("code", ["F8_E4M3", "I64"])
def test_tensors_of_a_kind_that_no_model_here_has_are_named(llama, tmp_path, code):
    path, _ = llama
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    width = {"F8_E4M3": 1, "I64": 8}[code]
    at = 0
    for entry in (one for name, one in header.items() if name != "__metadata__"):
        end = at + int(np.prod(entry["shape"])) * width
        entry |= {"dtype": code, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    said = refusal(path, tmp_path / "out")
    assert f"neither float32, float16 nor bfloat16: lm_head.weight ({code})" in said


ODD_ENDS = ['"<|end|>"', "-1", "true", "2.0", "10000000000", "[[1]]"]


@pytest.mark.parametrize("text", ["[]", "{", *(f'{{"eos_token_id": {end}}}' for end in ODD_ENDS)])
def test_a_generation_config_that_is_none_is_told(tmp_path, text):
    assert kept.generation(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="does not say which tokens end a text"):
        kept.generation(tmp_path)


@pytest.mark.parametrize(("named", "ends"), [(None, []), (0, [0]), ([10, 2], [10, 2])])
def test_tokens_that_end_a_text(tmp_path, named, ends):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert kept.ends(kept.generation(tmp_path)) == ends


def test_without_a_generation_config_the_model_s_own_says_what_ends_a_text(llama):
    path, _ = llama
    assert stored.look(path).generation == {"eos_token_id": 2}
    edit(path, eos_token_id=[2, 7])
    assert kept.ends(stored.look(path).generation) == [2, 7]
    (path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert kept.ends(stored.look(path).generation) == [5]
    for odd in ('"a"', '""', "[[1]]", "-1", "true", "false"):
        edit(path, eos_token_id=json.loads(odd))
        with pytest.raises(ValueError, match=r"eos_token_id=.*, where the number of a token"):
            stored.look(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": []}, "not readable as what jaxlm writes"),
        ({"hf": None}, "not readable as what jaxlm writes"),
        ({"generation": [1]}, "not readable as what jaxlm writes"),
        ({"model": {"width": "a"}}, 'says width="a", which cannot be'),
        ({"model": {"vocabulary": 9, "width": 0}}, "model.json: config.model.width is 0"),
        ({"hf": {"max_position_embeddings": "a"}}, 'max_position_embeddings="a", where'),
        ({"generation": {"eos_token_id": "a"}}, 'eos_token_id="a", where'),
    ],
)
def test_what_a_model_json_cannot_say(tmp_path, change, words):
    said = {"format": 1, "model": {"vocabulary": 9}, "hf": {}, "generation": {}}
    (tmp_path / "model.json").write_text(json.dumps(said))
    assert kept.read(tmp_path).options.vocabulary == 9
    (tmp_path / "model.json").write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=words):
        kept.read(tmp_path)


@pytest.mark.parametrize("config", [{}, {"method": 3}, {"method": "dpo", "model": {"width": "a"}}])
def test_a_run_json_of_another_kind_is_told(tmp_path, config):
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ValueError, match=r"run.json cannot be read as what a run writes"):
        stored.look(tmp_path)
