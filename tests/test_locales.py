"""The page in other languages: nothing is missing, nothing is stale, and a server serves it."""
import json
import re

import pytest

import make_locales

LANGUAGES = make_locales.LANGUAGES


@pytest.fixture(scope="module")
def texts(comfyui):
    from pack.nodes import NODES
    return make_locales.english(NODES)


@pytest.fixture(scope="module")
def catalogue():
    return make_locales.read(make_locales.CATALOGUE)


def test_every_text_of_every_node_is_translated_and_the_files_are_those_that_the_command_writes(texts, catalogue):
    assert list(make_locales.faults(texts, catalogue)) == [], "run dev/make_locales.py"
    assert make_locales.flat(make_locales.read(make_locales.file_of("en"))) == texts
    for language in LANGUAGES:
        found = make_locales.flat(make_locales.read(make_locales.file_of(language)))
        assert found == make_locales.translated(texts, catalogue, language) and found.keys() == texts.keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_user_types_stands_as_it_is_typed(texts, catalogue, language):
    """Sizes, shares and names of files and kernels are the same in every language."""
    typed = re.compile(r"\d+(?:\.\d+)?x\d+(?:\.\d+)?x\d+(?:\.\d+)?|[a-z]+_[a-z_]+|\.json|4x4x4|6x8x8")
    for text in set(texts.values()):
        if " " in text:
            missing = [word for word in typed.findall(text) if word not in catalogue[text][language]]
            assert not missing, (text, missing)


def test_a_text_that_changed_is_noticed_with_its_key_and_what_it_was(texts, catalogue):
    path = next(path for path in texts if path[-1] == "tooltip")
    changed = {**texts, path: "Something else."}
    entries = make_locales.updated(catalogue, texts, changed)
    (said,) = make_locales.faults(changed, entries)
    assert said.startswith(".".join(path)) and repr(texts[path]) in said
    assert make_locales.translated(changed, entries, "zh").keys() == texts.keys() - {path}
    unadapted = list(make_locales.faults(changed, catalogue))
    assert [line for line in unadapted if line.startswith(f"{'.'.join(path)}: not in ja")], "before the command has run"


@pytest.mark.parametrize("text", ["a {value}", "100 @ once", "one | two"])
def test_what_the_page_would_read_as_syntax_is_refused(text):
    entry = dict.fromkeys(LANGUAGES, "x")
    assert any("syntax" in line for line in make_locales.faults({("A", "description"): text}, {text: entry}))


def test_the_files_are_what_the_host_reads(comfyui):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager
    kept = folder_paths.folder_names_and_paths["custom_nodes"]
    folder_paths.folder_names_and_paths["custom_nodes"] = ([str(make_locales.ROOT.parent)], set())
    try:
        built = CustomNodeManager().build_translations()
    finally:
        folder_paths.folder_names_and_paths["custom_nodes"] = kept
    for language in ("en", *LANGUAGES):
        assert built[language]["nodeDefs"]["VideoSparseAttentionPatch"]["inputs"]["sparsity"]["tooltip"]
    assert json.dumps(built["zh"], ensure_ascii=False) != json.dumps(built["en"])
