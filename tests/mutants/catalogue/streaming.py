"""Of conversions layer by layer: shards, layers that come and go, gradients on the way back, what it takes."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/surgery/streaming", "tests/attnzoo/surgery/streaming"
shards = partial(Mutant, file=f"{FOLDER}/shards.py", tests=f"{TESTS}/test_shards.py")
skeleton = partial(Mutant, file=f"{FOLDER}/skeleton.py", tests=f"{TESTS}/test_convert_folder.py")
sweeps = partial(Mutant, file=f"{FOLDER}/sweeps.py", tests=f"{TESTS}/test_convert_folder.py")
convert = partial(Mutant, file=f"{FOLDER}/convert.py", tests=f"{TESTS}/test_convert_folder.py")
estimate = partial(Mutant, file=f"{FOLDER}/estimate.py", tests=f"{TESTS}/test_estimate.py")

MUTANTS = (
    shards(
        "streaming-mapped", old=".clone(memory_format=torch.contiguous_format)", new="",
        wrong="tensors lie in files that are mapped still", tests=f"{TESTS}/test_shards.py -k own",
    ),
    shards(
        "streaming-disagree", old="other.dtype != found.dtype or not torch.equal(self[name], opened.get_tensor(name))", new="False",
        wrong="of two shards that disagree the last is believed", tests=f"{TESTS}/test_shards.py -k disagree",
    ),
    skeleton(
        "streaming-layers-stay", old="        finally:\n            self._let_go(names)", new="        finally:\n            pass",
        wrong="every layer that was read stays in memory", tests=f"{TESTS}/test_convert_folder.py -k one_layer",
    ),
    sweeps(
        "streaming-gradient-stays", old="grads[at] = x.grad if x.grad is not None else torch.zeros_like(x)", new="pass",
        wrong="every layer goes backward from the loss", tests=f"{TESTS}/test_convert_folder.py -k 'memory_makes and bf16-latent'",
    ),
    sweeps(
        "streaming-sums-of-first-batch", old="                    seen.add_to(found, real_tokens(batch))\n                    grads",
        new="                    seen.add_to(found, real_tokens(self.batches[0])) if at == 0 else None\n                    grads",
        wrong="the first batch alone is summed up", tests=f"{TESTS}/test_convert_folder.py -k 'memory_makes and bf16-latent'",
    ),
    convert(
        "streaming-dtype-of-run", old="self.writer.write(self._number(path), self.skeleton.as_written(tensors))",
        new="self.writer.write(self._number(path), tensors)", within="_Conversion._change",
        wrong="weights are written in the dtype of the run", tests=f"{TESTS}/test_convert_folder.py -k runs_in_fp32",
    ),
    convert(
        "streaming-converted-again", old="if (source / files.RECIPE).is_file():", new="if False:",
        wrong="a converted folder loses its recipe", tests=f"{TESTS}/test_convert_folder.py -k refused",
    ),
    estimate(
        "streaming-memory-begun", old="self.least > self.free:", new="self.least > 2 * self.free:",
        wrong="what does not fit is begun", tests=f"{TESTS}/test_estimate.py -k missing",
    ),
)  # fmt: skip
