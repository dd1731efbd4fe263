"""Write locales/<language>/nodeDefs.json: what ComfyUI's page shows of the nodes, in every language.

    python dev/make_locales.py

English is read from the nodes' schemas. The other languages stand in dev/translations.json, each under the English
text that it translates, so a text that the schemas changed has no translation any more. The command then brings that
file into the schemas' order, drops what no schema says, and puts a form there for what is new:

    "Share of the clip that ...": {"was": "Part of the clip that ...", "zh": "...", "ja": "..."}

Adapt the translations, remove `was` (it is absent where the text is new altogether), run the command again. Until then
the page shows the schema's English, the command exits with 1 and a test fails. Needs a ComfyUI (comfy_boot.py).
"""
import json
import sys
from pathlib import Path

import comfy_boot
from load_pack import load_pack

ROOT = Path(__file__).resolve().parent.parent
LOCALES, CATALOGUE = ROOT / "locales", ROOT / "dev" / "translations.json"
LANGUAGES = ("zh", "ja")
SYNTAX = "@{}|"
"""Signs that the page's vue-i18n reads as linked messages, values and plurals, not as text."""


def page_key(name):
    """A name as part of a key, as the page looks it up."""
    return name.replace(".", "_")


def english(nodes):
    """{path of keys in nodeDefs.json: text} of all nodes, in the schemas' order. An output that is called as its type
    is not there: the page takes its name from its own list of types."""
    texts = {}
    for node in nodes:
        schema = node.define_schema()
        name = page_key(schema.node_id)
        texts[name, "display_name"] = schema.display_name
        texts[name, "description"] = schema.description
        for socket in schema.inputs:
            texts[name, "inputs", page_key(socket.id), "name"] = socket.display_name or socket.id
            texts[name, "inputs", page_key(socket.id), "tooltip"] = socket.tooltip
        for index, socket in enumerate(schema.outputs):
            called = socket.display_name or socket.id
            texts[name, "outputs", str(index), "name"] = None if called == socket.get_io_type() else called
            texts[name, "outputs", str(index), "tooltip"] = socket.tooltip
    return {path: text for path, text in texts.items() if text}


def translated(texts, catalogue, language):
    """The texts in a language. One without a valid translation is left out: the page then shows the schema's."""
    return {path: catalogue[text][language] for path, text in texts.items()
            if catalogue.get(text, {}).get(language) and "was" not in catalogue[text]}


def updated(catalogue, before, texts):
    """The catalogue for the texts, in their order. `before`: the texts that it was made for."""
    entries = {}
    for path, text in texts.items():
        if text in catalogue:
            entries[text] = catalogue[text]
        elif text not in entries:
            entry, was = dict.fromkeys(LANGUAGES, ""), before.get(path)
            if was in catalogue:
                entry = {"was": was, **entry, **catalogue[was]}
            entries[text] = entry
    return entries


def faults(texts, catalogue):
    """What is wrong with the catalogue for these texts, as sentences that name the key."""
    for path, text in texts.items():
        entry, key = catalogue.get(text, {}), ".".join(path)
        if "was" in entry:
            yield f"{key}: the translations follow {entry['was']!r}, the schema says {text!r}"
            continue
        for language in LANGUAGES:
            if not entry.get(language):
                yield f"{key}: not in {language}: {text!r}"
    for text in catalogue.keys() - set(texts.values()):
        yield f"no schema says {text!r} any more"
    for text, entry in catalogue.items():
        for message in (text, *(entry.get(language, "") for language in LANGUAGES)):
            if signs := set(message) & set(SYNTAX):
                yield f"{message!r}: the page reads {' '.join(sorted(signs))} as syntax"


def nested(texts):
    """{path: text} as the tree that nodeDefs.json is."""
    tree = {}
    for path, text in texts.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = text
    return tree


def flat(tree, path=()):
    """The reverse of `nested`."""
    texts = {}
    for key, value in tree.items():
        texts |= flat(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return texts


def file_of(language):
    return LOCALES / language / "nodeDefs.json"


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def main():
    comfy_boot.boot()
    load_pack()
    from pack.nodes import NODES
    texts = english(NODES)
    catalogue = updated(read(CATALOGUE), flat(read(file_of("en"))), texts)
    write(CATALOGUE, catalogue)
    write(file_of("en"), nested(texts))
    for language in LANGUAGES:
        write(file_of(language), nested(translated(texts, catalogue, language)))
    wrong = list(faults(texts, catalogue))
    print("\n".join(wrong) or f"{len(texts)} texts in en, {', '.join(LANGUAGES)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
