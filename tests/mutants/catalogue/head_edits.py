"""Of edits of heads: which heads, in which order, in which rows, and what is left behind."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo/heads/edits"
edit = partial(Mutant, file="attnzoo/surgery/edits/edit.py", tests=f"{TESTS}/test_outputs.py")
outputs = partial(Mutant, file="attnzoo/surgery/edits/outputs.py", tests=f"{TESTS}/test_outputs.py")
edited = partial(Mutant, file="attnzoo/surgery/edits/edited.py", tests=f"{TESTS}/test_outputs.py -k leaves_none_behind")
calls = partial(Mutant, file="attnzoo/surgery/edits/calls.py", tests=f"{TESTS}/test_outputs.py -k 'last or chosen'")
fold = partial(Mutant, file="attnzoo/surgery/edits/fold.py", tests=f"{TESTS}/test_fold.py")
standing = partial(Mutant, file="attnzoo/surgery/edits/lasting/standing.py", tests=f"{TESTS}/test_standing.py")

MUTANTS = (
    edit(
        "edits-heads-of-other-groups", old="head * group + i for head", new="head + i * site.kv_heads for head",
        wrong="a KV head stands for heads that lie G apart",
    ),
    edit("edits-nothing-is-something", old="return not _is_constant(self.scale, 1.0)", new="return True", wrong="edits that change nothing leave hooks"),
    outputs("edits-offset-first", old='x + self._of_heads(edit, tensors["offset"], x)', new='x + self._of_heads(edit, tensors["offset"], x) * (tensors["scale"] if "scale" in tensors else edit.scale)', wrong="what is added is multiplied"),
    outputs("edits-tensors-of-other-groups", old="own.repeat_interleave(self.site.heads // self.site.kv_heads, -2)", new="own.repeat(self.site.heads // self.site.kv_heads, 1)", wrong="heads of a group have each other's scales"),
    edited(
        "edits-stay-after-an-error", old="        for remove in put_edits(model, found):\n            restored.callback(remove)\n        yield",
        new="        removals = put_edits(model, found)\n        yield\n        for remove in removals:\n            remove()", wrong="an exception leaves hooks behind",
    ),
    calls("edits-last-is-padding", old="None if tokens == 1 else calls.real(tokens)", new="None", wrong="padding on the right is the last token"),
    calls("edits-last-is-guessed", old="if self._given is None or not (self._runs or is_replay()):", new="if self._given is None:", wrong="a part of a model is called with an older call's padding"),
    fold("fold-rows-for-columns", old="module.weight.T if is_conv1d(module) else module.weight", new="module.weight", wrong="rows of GPT-2's weight are taken for columns"),
    fold("fold-scaled-offset", old="old @ self.offset[heads].flatten()", new="(old * self.scale[heads].flatten()) @ self.offset[heads].flatten()", wrong="offsets meet the scale twice"),
    fold("fold-loses-what-came-later", old="x._version != version", new="False", wrong="an undo loses what was done since"),
    fold("fold-shared", old="x.data_ptr() == module.weight.data_ptr()", new="False", wrong="another module changes too"),
    standing("edits-lost-with-the-report", old="self._standing.removals.extend(put_edits(self._model, placed))", new="self.removals = put_edits(self._model, placed)", wrong="edits of reads go when nobody holds the report", within="EditsChange.make"),
    Mutant(
        "edits-lost-under-a-replacement", file="attnzoo/surgery/transaction.py", old="block.new.__dict__[HEAD_EDITS] = block.old.__dict__[HEAD_EDITS]", new="pass",
        wrong="what takes a block's place does not know its edits", tests=f"{TESTS}/test_standing.py -k 'saved_and_loaded and moh'",
    ),
)  # fmt: skip
