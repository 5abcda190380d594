"""Of models: conversion and its undo, hosts, replacements and their caches, files; and what the command line is a skin over."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery", "tests/attnzoo/surgery"
files = partial(
    Mutant,
    file=f"{FOLDER}/files.py",
    tests=f"{TESTS}/test_files.py -k 'midway or hash or another_base or in_use or never_converted'",
)
changes = partial(Mutant, file=f"{FOLDER}/transaction.py", tests=f"{TESTS}/test_convert.py")
stored = partial(Mutant, file=f"{FOLDER}/stored.py", tests=f"{TESTS}/test_written.py")
CONFORMANCE = f"{TESTS}/families/test_conformance.py"
OWN_WINDOWS = f"{TESTS}/families/test_own_windows.py"
interface = partial(
    Mutant, file=f"{FOLDER}/hosts/attention_function.py", tests=f"{TESTS}/hosts/test_generate.py -k 'window or mha'"
)
replacement = partial(
    Mutant, file=f"{FOLDER}/replacements/replacement.py", tests=f"{TESTS}/replacements/test_replacements.py"
)
replacement_cache = partial(
    Mutant,
    file=f"{FOLDER}/hosts/caches/cache_layer.py",
    tests=f"{TESTS}/replacements/test_replacements.py -k 'cache or refused'",
)
tokens = partial(
    Mutant,
    file=f"{FOLDER}/replacements/landmark_tokens.py",
    tests=f"{TESTS}/replacements/test_landmark.py -k 'not heal'",
)
landmark_cache = partial(
    Mutant,
    file=f"{FOLDER}/hosts/caches/landmark_cache.py",
    tests=f"{TESTS}/replacements/test_landmark.py -k 'cut_back'",
)
llama = partial(Mutant, file=f"{FOLDER}/hosts/families/llama.py", tests=f"{TESTS}/lowrank/test_factor.py")
projections = partial(Mutant, file=f"{FOLDER}/hosts/projections.py", tests=f"{TESTS}/lowrank/test_factor.py")
checkpoint = partial(Mutant, file=f"{FOLDER}/hosts/checkpoint.py", tests=f"{TESTS}/hosts/test_checkpoint.py")
folders = partial(Mutant, file=f"{FOLDER}/hosts/folders.py", tests=f"{TESTS}/hosts/test_folders.py")
weights = partial(Mutant, file=f"{FOLDER}/hosts/weights.py", tests=f"{TESTS}/hosts/test_weights_not_here.py")
doctor = partial(Mutant, file="attnzoo/doctor.py", tests="tests/attnzoo/test_doctor.py -k 'not every_case'")
models = partial(Mutant, file="attnzoo/cli/models.py", tests="tests/attnzoo/cli/test_models.py")
bench = partial(
    Mutant,
    file="attnzoo/evaluation/costs_report.py",
    tests="tests/attnzoo/evaluation/test_layer_costs.py -k 'shape or wrong'",
)

MUTANTS = (
    changes(
        "convert-undo-order", old="        if model.__dict__.get(RECIPE_ATTRIBUTE) is not recipe:", new="        if model.__dict__.get(RECIPE_ATTRIBUTE) != recipe:", wrong="an undo goes by equal recipes, not by this one",
        tests=f"{TESTS}/test_convert.py -k undo",
        survives="a report is undone once, and each recipe that stands extends the one before: no two of them are equal.",
    ),
    changes(
        "convert-undo-heads", old="settings.num_key_value_heads = old_heads", new="settings.num_key_value_heads = settings.num_key_value_heads", wrong="undo leaves the new number of KV heads in the configuration",
        tests=f"{TESTS}/test_convert.py -k undo",
    ),
    changes(
        "convert-undo-rules", old="attention_function.set_pattern(block.old, pattern)", new="attention_function.set_pattern(block.old, None)", wrong="undo of a second reading conversion takes the first away too",
        tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    Mutant(
        "convert-s2-sink", file=f"{FOLDER}/kinds/reading.py", old='"s2": {"sink_blocks": 1}', new='"s2": {"sink_blocks": 0}', wrong="s2 drops the sink by default", tests=f"{TESTS}/test_convert.py -k 's2 or warns'",
    ),
    Mutant(
        "convert-bytes-of-latent", file=f"{FOLDER}/replacements/latent.py", old="cached_values=lambda: self.kv_down.out_features", new="cached_values=lambda: 2 * self.num_kv_heads * self.head_dim", wrong="a latent replacement is said to hold what its host held",
        tests=f"{TESTS}/test_convert.py -k 'cache or bytes'",
    ),
    changes(
        "convert-heads-of-some", old="if old_heads is not None and len(counts) == 1 and all(change.keeps_class for change in changes):", new="if True:", wrong="a conversion of some layers changes the number of heads of all",
        tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    Mutant(
        "convert-scale-of-reading", file=f"{FOLDER}/kinds/reading.py", old="scale=block.asked_scale,", new="scale=None,", wrong="a read pattern ignores the host's own scale", tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    files(
        "files-hash-without-shape", old='f"{name}|{x.dtype}|{list(x.shape)}|"', new='f"{name}|"', wrong="a base with other shapes or dtypes and equal bytes is taken", tests=f"{TESTS}/test_written.py -k hash",
    ),
    files(
        "files-hash-without-changed", old="kept = {name: x for name, x in stored.once(model).items() if not name.startswith(changed)}", new="kept = {name: x for name, x in stored.once(model).items() if name.startswith(changed)}",
        wrong="an adapter knows the blocks that it replaces and not those that stay", tests=f"{TESTS}/test_files.py -k 'another_base or adapter_on_its_base'",
    ),
    files(
        "files-old-folder-lost", old="        (old / folder.name).rename(folder)\n        old.rmdir()\n", new="", wrong="a swap that fails loses what was there", tests=f"{TESTS}/test_files.py -k midway {TESTS}/test_swap.py",
    ),
    files(
        "files-stranger-replaced", old="    if occupied and not (folder / RECIPE).is_file():", new="    if False:", wrong="overwrite replaces a folder that holds something else", tests=f"{TESTS}/test_files.py -k in_use",
    ),
    stored(
        "written-ordinary-by-kind", old="heads == {said}", new="True", wrong="a model of unequal heads passes for an ordinary checkpoint", tests=f"{TESTS}/test_written.py -k unequal",
    ),
    stored(
        "written-shared-memory", old="found[name] = own.clone() if place in seen else own", new="found[name] = own", wrong="two tensors in one memory cannot be written", tests=f"{TESTS}/test_written.py -k one_memory",
    ),
    interface(
        "interface-padded-offset", file=f"{FOLDER}/hosts/attending.py", old="before = real[:, :first].sum(1) if", new="before = real[:, :first].sum(1) * 0 if", wrong="padded items decode as if nothing came before",
    ),
    interface(
        "interface-static-cache", file=f"{FOLDER}/hosts/attending.py", old="replace(inputs, k=k[:, :, :held], v=v[:, :, :held]), geometry, first)", new="inputs, geometry, first)", wrong="a static cache is read beyond what it holds", tests=f"{TESTS}/hosts/test_generate.py -k static",
    ),
    interface(
        "interface-mask-function", file=f"{FOLDER}/hosts/geometry.py", old='    raise UnsupportedError(\n        "attention_mask: expected causality, a sliding', new='    return True, None\n    raise UnsupportedError(\n        "attention_mask: expected causality, a sliding', wrong="a further rule of the host's is dropped silently",
        tests=f"{TESTS}/test_refusals.py -k 'packed or mask' {TESTS}/hosts/test_hosts.py -k 'packed or mask or window'",
    ),
    interface(
        "own-window-lost-beside-shards", file=f"{FOLDER}/hosts/attending.py", old="plan = replace(plan, extras=replace(plan.extras, window=geometry.window))", new="pass",
        wrong="shards of a block reach beyond its own window", tests=f"{OWN_WINDOWS} -k shards_are_read_within",
    ),
    interface(
        "own-window-forgets-where-keys-begin", file=f"{FOLDER}/hosts/attending.py", old="return first - max(gone, 0)", new="return first",
        wrong="queries behind a sliding cache read keys that are not there", tests=f"{OWN_WINDOWS} -k 'sliding_caches and Gemma'",
    ),
    interface(
        "own-window-is-widened", file=f"{FOLDER}/hosts/site.py", old="min(window, own)", new="window",
        wrong="a conversion to a longer window reads more than the block did", tests=f"{OWN_WINDOWS} -k within_the_blocks_own",
    ),
    interface(
        "own-window-by-token-with-padding", file=f"{FOLDER}/hosts/attending.py", old="masked_fill(~real, -torch.inf)", new="masked_fill(real & ~real, -torch.inf)",
        wrong="blocks with windows of their own read padding", tests=f"{OWN_WINDOWS} -k 'sliding_caches and Gemma and replaced'",
    ),
    interface(
        "norms-of-all-heads-apart", file=f"{FOLDER}/hosts/families/llama.py", old="return weight is not None and weight.shape[-1] != host.head_dim", new="return False",
        wrong="OLMo 2's norms take each head by itself", tests=f"{CONFORMANCE} -k 'refused_by_name and OLMo and moh'",
    ),
    interface(
        "layers-without-rotation-are-rotated", file=f"{FOLDER}/hosts/families/llama.py", old='    if not getattr(host, "use_rope", True):\n        return None\n', new="",
        wrong="SmolLM3's layers without rotation are rotated when replaced", tests=f"{CONFORMANCE} -k 'refused_by_name and SmolLM3 and moh'",
    ),
    interface(
        "adapters-are-not-called", file=f"{FOLDER}/replacements/host_projector.py", old="        view.__dict__[held] = module.__dict__[held]", new="        view.__dict__[held] = dict(module.__dict__[held]) if isinstance(module.__dict__[held], dict) else module.__dict__[held]",
        wrong="what is put in a projection's place later does not project", tests=f"{CONFORMANCE} -k 'later_projects and Qwen3-replaced'",
    ),
    interface(
        "interface-groups-of-rule", old="if layer.config.kv_heads == groups:", new="if True:", wrong="a pattern for other KV heads is kept as it is", tests=f"{TESTS}/test_convert.py -k compose {TESTS}/hosts/test_positions.py -k another_number",
    ),
    replacement(
        "replaced-padding-of-now", old="padding = None if real is None else ~real[:, first:]", new="padding = None if real is None else ~real[:, :tokens]", wrong="later calls are padded as the first was",
    ),
    replacement(
        "replaced-dropout", old="if self.training and self.drops:", new="if False:", wrong="attention dropout is dropped silently", tests=f"{TESTS}/replacements/test_replacements.py -k honour",
    ),
    replacement(
        "replaced-padding-forgotten", file="attnzoo/surgery/hosts/positions.py", old='            raise ShapeError("attention_mask: expected the padding of earlier calls again, got none")', new="            pass", wrong="padding that is forgotten in a later call goes unnoticed",
        tests=f"{TESTS}/replacements/test_replacements.py -k forgotten",
    ),
    replacement_cache(
        "replaced-cache-crop-padding", old="memory.crop(left if real is None else real.sum(1))", new="memory.crop(left)", wrong="padding takes room in a cache that is cut back",
    ),
    replacement_cache(
        "replaced-cache-beams", old="self.memory.reorder(beam_idx)", new="self.memory.reorder(beam_idx.sort().values)", wrong="beams take each other's caches", tests=f"{TESTS}/replacements/test_replacements.py -k cut_back {TESTS}/hosts/test_generate.py -k 'beams and replaced'",
    ),
    replacement_cache(
        "replaced-cache-real-of-beams", old="self.real = self.real.index_select(0, beam_idx.to(self.real.device))", new="pass", wrong="beams keep each other's padding",
    ),
    replacement_cache(
        "replaced-cache-of-another-model", old='        raise ShapeError("past_key_values: expected an empty cache, or one that this model has filled")\n    layers', new="        pass\n    layers", wrong="a cache that another model filled is thrown away silently",
        tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    tokens(
        "landmark-input-offset", old="offset=held[0].given_tokens if held else 0,", new="offset=0,", wrong="landmarks of later calls count from the beginning",
    ),
    tokens(
        "landmark-input-mean", old="nn.Parameter(mean_embedding(embeddings), requires_grad=embeddings.requires_grad)", new="nn.Parameter(mean_embedding(embeddings))", wrong="the landmark's embedding trains in a frozen model", tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    tokens(
        "landmark-input-drop", old="return inserted.drop(output) if output.shape[:2] == inserted.is_landmark.shape else output", new="return output", wrong="outputs of landmarks come out",
    ),
    landmark_cache(
        "landmark-cache-crop", old="self.seen = length_with_landmarks(tokens, self.block_size)", new="self.seen = tokens", wrong="a cache that is cut back loses tokens for its landmarks",
    ),
    llama(
        "llama-positions-limit", old='max_positions=getattr(host.config, "max_position_embeddings", None)', new="max_positions=None", wrong="scalings that count from the host's length do not find it",
        tests=f"{TESTS}/hosts/test_hosts.py {TESTS}/hosts/test_positions.py",
    ),
    projections(
        "llama-trainable", old="trainable = like.weight.requires_grad", new="trainable = True", wrong="new weights of frozen blocks train", tests=f"{TESTS}/test_training.py -k frozen {TESTS}/test_convert.py -k frozen",
    ),
    projections(
        "llama-same-memory", old=".clone(memory_format=torch.contiguous_format)", new="", within="set_weights", wrong="a converted block shares memory with the one before", tests=f"{TESTS}/hosts/test_own_memory.py",
    ),
    checkpoint(
        "checkpoint-code", old='for key in ("auto_map", "custom_pipelines"):', new='for key in ("custom_pipelines",):', wrong="a checkpoint that brings code is read", tests=f"{TESTS}/hosts/test_checkpoint.py -k hostile",
    ),
    checkpoint(
        "checkpoint-two-files", old="if found[name].dtype != tensors[name].dtype or not torch.equal(found[name], tensors[name]):", new="if found[name].dtype != tensors[name].dtype:", wrong="of two values of one tensor the last wins",
        tests=f"{TESTS}/hosts/test_checkpoint.py -k 'two_files'",
    ),
    folders(
        "folders-link", old="if not target.is_relative_to(folder) and not _is_blob(target, folder):", new="if not target.is_relative_to(folder.parent) and not _is_blob(target, folder):", wrong="a link may lead to a neighbouring folder",
        tests=f"{TESTS}/hosts/test_folders.py -k link {TESTS}/hosts/test_checkpoint.py -k link",
    ),
    folders(
        "folders-pickle-by-name", old='tensors = head[8:] == b"{" and', new='tensors = head[8:] == b"{" or', wrong="a pickle whose first bytes are no header passes", tests=f"{TESTS}/hosts/test_checkpoint.py -k 'hostile or pickle'",
        survives="what passes here by chance is refused by the reader of safetensors right after, as damaged: nothing unpickles.",
    ),
    weights(
        "weights-meta", old="    if x.is_meta:\n        return", new="    if False:\n        return", wrong="offloaded weights convert to garbage",
    ),
    doctor(
        "doctor-healthy", old="not all(check.holds for check in self.checks)", new="not any(check.holds for check in self.checks)", wrong="one case that holds makes a machine healthy", tests="tests/attnzoo/test_doctor.py -k 'exit_code'",
    ),
    models(
        "models-text-limit", old="if path.stat().st_size > TEXT_BYTES:", new="if path.stat().st_size < 0:", wrong="a text of any size is read",
    ),
    models(
        "models-special-tokens", old="tokenizer(text, add_special_tokens=False, verbose=False)", new="tokenizer(text, verbose=False)", wrong="a text begins with special tokens",
    ),
    bench(
        "bench-ratio-column", old='f"{cost.times_baseline[kind]:.2f}"] if known', new='f"{cost.milliseconds[kind]:.2f}"] if known', wrong="the ratio's column shows milliseconds", tests="tests/attnzoo/cli/test_models.py",
    ),
)  # fmt: skip
