"""Of surgery's files: which are read, what is written, the gate before a block is replaced, and layers by number."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

HOSTS, TESTS = "attnzoo/surgery/hosts", "tests/attnzoo/surgery"
folders = partial(Mutant, file=f"{HOSTS}/folders.py", tests=f"{TESTS}/hosts/test_folders.py")
checkpoint = partial(Mutant, file=f"{HOSTS}/checkpoint.py", tests=f"{TESTS}/hosts/test_folders.py")
gate = partial(Mutant, file=f"{HOSTS}/weights.py", tests=f"{TESTS}/hosts/test_weights_not_here.py")
stored = partial(Mutant, file="attnzoo/surgery/stored.py", tests=f"{TESTS}/test_written.py")
files = partial(Mutant, file="attnzoo/surgery/files.py", tests=f"{TESTS}/test_written.py")
places = partial(Mutant, file="attnzoo/surgery/sites.py", tests=f"{TESTS}/test_written.py -k twice")
layers = partial(Mutant, file="attnzoo/cli/layers.py", tests="tests/attnzoo/cli/test_convert.py -k layer")

MUTANTS = (
    folders(
        "folders-any-link", old="if not target.is_relative_to(folder) and not _is_blob(target, folder):", new="if False:",
        wrong="a link may lead anywhere", tests=f"{TESTS}/hosts/test_folders.py -k links",
    ),
    folders(
        "folders-any-repository", old="own = target.parent == repository / \"blobs\"", new="own = target.parent.name == \"blobs\"",
        wrong="a snapshot may lead to another repository's blobs", tests=f"{TESTS}/hosts/test_folders.py -k links",
    ),
    folders(
        "folders-below-blobs", old="own = target.parent == repository / \"blobs\"", new="own = target.is_relative_to(repository)",
        wrong="a snapshot may lead anywhere in its repository", tests=f"{TESTS}/hosts/test_folders.py -k links",
    ),
    folders(
        "folders-shared-without-hash", old=" and _HASH.fullmatch(target.name)", new="",
        wrong="any file of the shared store will do", tests=f"{TESTS}/hosts/test_folders.py -k links",
    ),
    folders(
        "folders-unguarded-json", old="    check_link(path)\n", new="", wrong="configurations and indices follow any link",
        within="read_json", tests=f"{TESTS}/hosts/test_folders.py -k links",
    ),
    folders(
        "folders-other-files-too", old="        if (folder / name).is_file():", new="        if name == CONVERTED and (folder / name).is_file():",
        wrong="what lies beside the whole file is read too", tests=f"{TESTS}/hosts/test_folders.py -k 'other_files'",
    ),
    folders(
        "folders-system-number", old="number = int(code[1] or code[2])", new="number = 5",
        wrong="a full disk is said to be another fault", tests=f"{TESTS}/test_written.py -k disk",
    ),
    folders(
        "folders-parents-left", old="        if not beside.exists():", new="        if False:",
        wrong="a write that fails leaves empty parents", tests=f"{TESTS}/test_written.py -k disk",
    ),
    checkpoint(
        "checkpoint-flag-believed", old="    if pair is None:\n        return model\n    # What", new="    if True:\n        return model\n    # What",
        wrong="the output layer overwrites the embedding that the flag ties it to", tests=f"{TESTS}/hosts/test_folders.py -k flag",
    ),
    checkpoint(
        "checkpoint-tied-both-missing", old="not shared.get(name, set()) & given", new="name not in shared",
        wrong="a tied tensor without any name in the file is not missed", tests=f"{TESTS}/hosts/test_folders.py -k enough",
    ),
    checkpoint(
        "checkpoint-codes-cast", file="attnzoo/surgery/hosts/weights.py", old="if own[name].is_floating_point() and x.dtype not in FLOATING:", new="if False:",
        wrong="codes of quantised weights are cast into weights", tests=f"{TESTS}/hosts/test_folders.py -k codes",
    ),
    checkpoint(
        "checkpoint-inv-freq", file="attnzoo/surgery/hosts/weights.py", old='        r"rotary_emb\\.inv_freq",\n', new="",
        wrong="checkpoints of older versions are refused", tests=f"{TESTS}/hosts/test_folders.py -k older",
    ),
    checkpoint(
        "checkpoint-class-ignores", file="attnzoo/surgery/hosts/weights.py", old='*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())', new="*()",
        wrong="what a class ignores is refused", tests=f"{TESTS}/hosts/test_folders.py -k class",
    ),
    checkpoint(
        "checkpoint-one-dtype", old="own[name].data = own[name].data.to(x.dtype)", new="pass",
        wrong="weights of a mixed checkpoint are cast", tests=f"{TESTS}/test_written.py -k mixed",
    ),
    checkpoint(
        "checkpoint-stop-tokens", old="model.generation_config = GenerationConfig.from_dict(read_json(file, CONFIG_BYTES))",
        new="GenerationConfig.from_dict(read_json(file, CONFIG_BYTES))",
        wrong="stop tokens are not read", tests="tests/attnzoo/cli/test_convert.py -k keeps",
    ),
    gate("gate-bias", old='for name in ("weight", "bias"):', new='for name in ("weight",):', wrong="biases may be elsewhere"),
    gate("gate-meta", old="    if x.is_meta:", new="    if False:", wrong="weights may be on the meta device"),
    gate("gate-dtype", old="if floating and (x.dtype not in FLOATING or x.is_quantized):", new="if False:", wrong="codes pass as weights"),
    gate("gate-subclass", old="    if type(x) not in _PLAIN:\n        return", new="    if False:\n        return", wrong="tensors of other libraries pass"),
    gate("gate-computed", old="if child._parameters.get(name) is None:", new="if False:", wrong="weights that are computed from others pass"),
    gate("gate-forward", old="if not is_transposed and type(child).forward is not nn.Linear.forward:", new="if False:", wrong="a forward of its own is lost"),
    gate(
        "gate-embedding", old="    if reason is not None:\n        raise UnsupportedError(\n            f\"embedding", new="    if False:\n        raise UnsupportedError(\n            f\"embedding",
        wrong="landmarks start as the mean of nothing",
    ),
    stored(
        "written-ordinary-anyway", old="config[\"model_type\"] = checkpoint.type_of_converted(config[\"model_type\"])", new="pass",
        wrong="a converted model loads in plain transformers as another", tests=f"{TESTS}/test_written.py -k nobody",
    ),
    stored(
        "written-unequal-heads", old=" and heads == {said}", new="",
        wrong="a model of unequal heads is written as an ordinary checkpoint", tests=f"{TESTS}/test_written.py -k unequal",
    ),
    stored(
        "written-dtype", old="reduce(torch.promote_types, found, found[0] if found else torch.float32)", new="found[0]",
        wrong="readers of one dtype round the wider weights", within="_widest", tests=f"{TESTS}/test_written.py -k mixed",
    ),
    stored(
        "written-names", old="    if odd:\n        what", new="    if False:\n        what",
        wrong="names that loading does not know are written", tests=f"{TESTS}/test_written.py -k refuse",
    ),
    stored(
        "written-shapes", old="if x.shape != wanted[name].shape:", new="if False:",
        wrong="shapes that loading refuses are written", tests=f"{TESTS}/test_written.py -k refuse",
    ),
    stored(
        "written-tied-flag", old='settings.tie_word_embeddings = getattr(outer, "weight", None) is getattr(inner, "weight", None)', new="pass",
        wrong="what is tied is said as the configuration has it", tests=f"{TESTS}/test_written.py -k said_as_it_is",
    ),
    files(
        "files-hash-shape", old="{list(x.shape)}|", new="", wrong="the base's hash does not know shapes",
        tests=f"{TESTS}/test_written.py -k hash",
    ),
    files(
        "files-hash-dtype", old="{x.dtype}|", new="", wrong="the base's hash does not know dtypes",
        tests=f"{TESTS}/test_written.py -k hash",
    ),
    files(
        "files-hash-name", old="{name}|{x.dtype}", new="{x.dtype}", wrong="the base's hash does not know names",
        tests=f"{TESTS}/test_written.py -k hash",
    ),
    files(
        "files-absent-base", old="    _refuse_absent(base, recipe)\n", new="", wrong="an adapter is put on weights that are not here",
        tests=f"{TESTS}/test_written.py -k not_here",
    ),
    files(
        "files-stop-tokens", old='model.generation_config.to_json_file(folder / "generation_config.json")', new="pass",
        wrong="stop tokens are not written", tests=f"{TESTS}/test_written.py -k nobody",
    ),
    places(
        "places-not-shared", old="place(model, paths[1:], model.get_submodule(paths[0]))", new="pass",
        wrong="a block that is applied twice is two after loading",
    ),
    layers("layers-open-end", old="last = max(first, count - 1) if open_ended", new="last = first if open_ended", wrong="8- is 8 alone"),
    layers("layers-last-of-span", old="range(first, last + 1)", new="range(first, max(last, first + 1))", wrong="the last layer of a span is left out"),
    layers("layers-beyond", old="if max(first, last) >= count:", new="if max(first, last) > count:", wrong="a layer behind the last is accepted"),
    Mutant(
        "files-names-of-before", file="attnzoo/surgery/hosts/weights.py", old="renamed = _renaming(model) if set(tensors) - names else str", new="renamed = str",
        wrong="names that transformers has changed since are not read", tests="tests/attnzoo/surgery/test_own_classes.py -k 'whole and images'",
    ),
    Mutant(
        "files-causal-anyway", file="attnzoo/surgery/hosts/checkpoint.py", old="    if is_model and isinstance(", new="    if False and isinstance(",
        wrong="every model is built as a causal one", tests="tests/attnzoo/surgery/test_own_classes.py -k 'whole and texts'",
    ),
)  # fmt: skip
