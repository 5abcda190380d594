"""Of layers in their users' hands: projections of other kinds, notices, steps that are replaced, weights started anew."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo", "tests/attnzoo"
projections = partial(
    Mutant,
    file=f"{FOLDER}/base/projections.py",
    tests=f"{TESTS}/base/test_projections.py -k 'not sharded and not quantized'",
)
notices = partial(Mutant, tests=f"{TESTS}/reporting/test_warn.py")
in_use = partial(Mutant, tests=f"{TESTS}/base/test_layers_in_use.py -k 'not annotations and not protocols'")

MUTANTS = (
    projections(
        "projection-packed-is-a-matrix",
        old="weight.is_floating_point() and weight.shape[1] == inputs",
        new="weight.is_floating_point()",
        wrong="bytes packed in another dtype are taken for a matrix",
    ),
    projections(
        "projection-storage-computes",
        old='    """Whether a weight is ``[rows, inputs]`` and no packed form or flat shard of it."""\n',
        new='    """Whether a weight is ``[rows, inputs]`` and no packed form or flat shard of it."""\n    return weight is not None\n',
        wrong="whatever is stored is taken for the matrix itself",
    ),
    projections(
        "projection-adapter-not-opened",
        old="while isinstance(base, nn.Module):",
        new="while False:",
        wrong="an adapter's own weights decide instead of those it is put round",
    ),
    projections(
        "projection-hook-forgotten",
        old="            if execution is not None:",
        new="            if False:",
        wrong="the cache of an offloaded layer lies on no memory",
    ),
    projections(
        "projection-weight-made-to-look",
        old='    if is_parametrized(projection, "weight"):',
        new="    if False:",
        wrong="a spectral norm takes a step whenever a cache is made",
    ),
    projections(
        "projection-no-whole-heads",
        old="    if rows % width or not 0 < rows <= heads * width:",
        new="    if False:",
        wrong="rows that are no heads make a cache of fewer",
    ),
    projections(
        "projection-o-not-compared",
        old="    if taken != given:",
        new="    if False:",
        wrong="an output's projection that is not sliced fails with a shape that names nothing",
    ),
    projections(
        "projection-v-not-compared",
        old='zip(("k_proj", "v_proj"), held[1:], strict=True)',
        new='zip(("k_proj",), held[1:], strict=False)',
        wrong="values that are not sliced as keys are go on",
    ),
    projections(
        "projection-cast-by-a-hook",
        old="        and not projection._forward_pre_hooks\n",
        new="",
        wrong="inputs are compared with weights that a hook casts for each call",
    ),
    Mutant(
        "cache-does-not-widen",
        f"{FOLDER}/cache/kv_cache.py",
        old="        if self._rounds:\n            return\n        with",
        new="        if True:\n            return\n        with",
        wrong="a cache keeps the dtype in which weights are stored, and rounds",
        tests=f"{TESTS}/base/test_projections.py -k 'stored'",
    ),
    Mutant(
        "evicting-does-not-widen",
        f"{FOLDER}/cache/evicting/cache.py",
        old="        self._widen(values)\n",
        new="",
        wrong="a cache that evicts rounds to the dtype in which weights are stored",
        tests=f"{TESTS}/base/test_projections.py -k 's2-stored'",
    ),
    notices(
        "notice-blames-torch",
        file="kernels/attnzoo_kernels/runtime/warn.py",
        old='"attnzoo_kernels", "torch", ',
        new='"attnzoo_kernels", ',
        wrong="a warning of a call points at torch's module call",
    ),
    notices(
        "notice-blames-kernels",
        file="kernels/attnzoo_kernels/runtime/warn.py",
        old='{"attnzoo", "attnzoo_kernels", ',
        new='{"attnzoo", ',
        wrong="a kernel's warning points into the kernels",
    ),
    notices(
        "notice-every-call",
        file=f"{FOLDER}/base/weights.py",
        old="        self._cautioned |= {message}\n",
        new="",
        wrong="a layer warns at every call",
    ),
    notices(
        "notice-not-kept-back",
        file=f"{FOLDER}/reporting/warn.py",
        old="    if not _SILENT.get():\n        _warn",
        new="    if True:\n        _warn",
        wrong="code that knows better cannot keep a notice back",
    ),
    notices(
        "notice-any-padding",
        file=f"{FOLDER}/base/inputs.py",
        old="bool(key_padding.all())",
        new="bool(key_padding.any())",
        wrong="any padding is taken for the inverse of a mask",
    ),
    notices(
        "notice-moh-asked-for",
        file=f"{FOLDER}/variants/moh/config.py",
        old=' or self.active_heads == "all":',
        new=":",
        wrong="active_heads='all' warns of what it asks for",
    ),
    in_use(
        "moh-goes-round-operate",
        file=f"{FOLDER}/variants/moh/layer.py",
        old='own_steps = self.runs_own("operate", MoHAttention) and ',
        new="own_steps = ",
        wrong="an overridden operate is not run where heads are computed apart",
    ),
    in_use(
        "steps-of-one-layer-missed",
        file=f"{FOLDER}/base/weights.py",
        old="return step not in vars(self) and ",
        new="return ",
        wrong="a step replaced on one layer is not run",
    ),
    in_use(
        "restart-routers-as-linears",
        file=f"{FOLDER}/variants/moh/layer.py",
        old="        super().restart(child)\n",
        new="        return super().restart(child)\n",
        wrong="routers start as any linear layer does",
    ),
    in_use(
        "restart-forgets-distances",
        file=f"{FOLDER}/variants/rcmha/layer.py",
        old="        super().reset_parameters()\n        self._start_relative()\n",
        new="        super().reset_parameters()\n",
        wrong="tables of distances keep what memory held",
    ),
    in_use(
        "restart-unchecked",
        file=f"{FOLDER}/base/weights.py",
        old="        check_restart(self)\n",
        new="",
        wrong="a module that cannot start anew is passed over",
    ),
    in_use(
        "landmarks-not-handed-on",
        file=f"{FOLDER}/variants/landmark/layer.py",
        old="context, is_landmark=is_landmark).out",
        new="context).out",
        wrong="landmarks given to the layer itself are ignored",
    ),
    in_use(
        "flag-by-truth",
        file=f"{FOLDER}/base/config.py",
        old="    if not isinstance(value, bool):\n        raise TypeError",
        new="    if value not in (True, False):\n        raise TypeError",
        wrong="1 is taken for a bool",
    ),
    in_use(
        "options-of-a-name-dropped",
        file=f"{FOLDER}/factory.py",
        old="return build_config(config_class, options) if options else config_class",
        new="return config_class",
        wrong="get_config ignores options",
    ),
)
