"""Of attnzoo.models: what is read and predicted, where texts end, what is drawn, whose options are whose."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

FOLDER, TESTS = "attnzoo/models", "tests/attnzoo/models"
decoder = partial(Mutant, file=f"{FOLDER}/decoder.py", tests=f"{TESTS}/test_decoder.py")
generation = partial(Mutant, file=f"{FOLDER}/decoder.py", tests=f"{TESTS}/test_generation.py")
sampling = partial(Mutant, file=f"{FOLDER}/sampling.py", tests=f"{TESTS}/test_generation.py -k drawn")

MUTANTS = (
    decoder(
        "models-landmarks-counted-twice", old="before = held - held // self.landmark_every", new="before = held",
        wrong="later calls put landmarks in wrong places", tests=f"{TESTS}/test_decoder.py -k 'any_length and landmark'",
    ),
    decoder(
        "models-no-auxiliary-loss", old="loss + aux_weight *", new="loss + 0 * aux_weight *",
        wrong="routers are not balanced", tests=f"{TESTS}/test_decoder.py -k 'followers and moh'",
    ),
    decoder(
        "models-padding-predicted", old="target.masked_fill(key_padding, IGNORED)", new="target",
        wrong="padding is predicted", tests=f"{TESTS}/test_decoder.py -k 'followers and mha'",
    ),
    generation(
        "models-last-slot-of-the-batch", old="row = last_tokens(ids, key_padding).view(-1, 1, 1)",
        new="row = torch.full_like(last_tokens(ids, key_padding), ids.shape[1] - 1).view(-1, 1, 1)",
        wrong="texts that are padded on the right go on from padding", tests=f"{TESTS}/test_generation.py -k 'whole_calls and mha'",
    ),
    generation(
        "models-no-end", old="torch.where(ended, out[-1][:, -1], sampling.choose(logits))", new="sampling.choose(logits)",
        wrong="texts go on behind their stop tokens", tests=f"{TESTS}/test_generation.py -k stop_token",
    ),
    sampling(
        "models-top-p-one-too-many", old="likely.cumsum(-1) - likely", new="likely.cumsum(-1) - likely - 0.2",
        wrong="tokens are drawn beyond top_p",
    ),
    sampling(
        "models-top-k-behind-top-p", old="best[..., self.top_k :] = -torch.inf", new="best[..., self.top_k + 1 :] = -torch.inf",
        wrong="one token more than top_k is drawn",
    ),
    Mutant(
        "models-silu-of-the-other", file=f"{FOLDER}/block.py", old="silu(self.gate(x)) * self.up(x)", new="silu(self.up(x)) * self.gate(x)",
        wrong="gate and values change places", tests=f"{TESTS}/test_decoder.py -k formulas",
    ),
)  # fmt: skip
