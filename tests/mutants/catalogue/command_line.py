"""Of the command line: suggestions, what is said of unknown models, tables, plain text, warnings, files and pictures."""

from __future__ import annotations

from functools import partial

from tests.mutants.record import Mutant

TESTS = "tests/attnzoo"
choices = partial(
    Mutant,
    file="attnzoo/reporting/choices.py",
    tests=f"{TESTS}/reporting/test_choices.py -k 'variant or word or option_of_a_layer'",
)
lookalikes = partial(
    Mutant, file="attnzoo/surgery/lookalikes.py", tests=f"{TESTS}/surgery/test_lookalikes.py -k 'door or known'"
)
options = partial(
    Mutant, file="attnzoo/surgery/kinds/replacing.py", tests=f"{TESTS}/reporting/test_choices.py -k conversion"
)
tables = partial(Mutant, file="attnzoo/reporting/tables.py", tests=f"{TESTS}/cli/test_widths.py -k 'table'")
prose = partial(Mutant, file="attnzoo/cli/prose.py", tests=f"{TESTS}/cli/test_widths.py -k 'markup'")
notices = partial(Mutant, file="attnzoo/cli/notices.py", tests=f"{TESTS}/cli/test_manners.py -k 'warning'")
entry = partial(Mutant, file="attnzoo/cli/entry.py", tests=f"{TESTS}/cli/test_manners.py -k 'list or show or wrong'")
outputs = partial(
    Mutant, file="attnzoo/reporting/outputs.py", tests=f"{TESTS}/cli/test_manners.py -k 'together or place'"
)
COMPARISON = f"{TESTS}/evaluation/test_compare_picture.py"
picture = partial(Mutant, file="attnzoo/evaluation/compare_picture.py", tests=f"{COMPARISON} -k 'named or line'")
charts = partial(Mutant, file="attnzoo/reporting/charts.py", tests=f"{COMPARISON} -k 'squeeze or settings'")
LOOKS = f"{TESTS}/reporting/test_charts.py"
looks = partial(Mutant, file="attnzoo/reporting/charts.py", tests=f"{LOOKS} -k 'mark'")
ends = partial(Mutant, file="attnzoo/reporting/labels.py", tests=f"{LOOKS} -k 'ends'")
labels = partial(Mutant, file="attnzoo/reporting/labels.py", tests=f"{COMPARISON} -k 'demo'")
HELP = f"{TESTS}/cli/test_help.py"
WRONG = f"{TESTS}/cli/test_wrong_input.py"
wrong_calls = partial(Mutant, file="attnzoo/cli/manual/wrong_calls.py", tests=f"{WRONG} -k 'number or mistake'")
shared = partial(Mutant, file="attnzoo/cli/manual/options.py", tests=f"{HELP} {WRONG} -k 'threads or mistake'")
pages = partial(Mutant, file="attnzoo/cli/screen.py", tests=f"{HELP} -k 'whole and compare'")
entered = partial(Mutant, file="attnzoo/cli/entry.py", tests=f"{WRONG} -k 'gone or signs or json'")

MUTANTS = (
    pages(
        "help-folded-call",
        old='GOES_ON = " \\\\"',
        new='GOES_ON = "  "',
        wrong="a call that is folded is two calls",
    ),
    pages(
        "help-broken-word",
        old="break_long_words=False)",
        new="break_long_words=True)",
        wrong="a word of a call is folded, which a shell reads as two",
    ),
    wrong_calls(
        "wrong-calls-command",
        old="named = next((word for word in words if word in group.commands), None)",
        new="named = None",
        wrong="a wrong option is answered with the page of all commands",
    ),
    shared(
        "options-unused",
        within="refuse_unused",
        old="        if given(context, name):",
        new="        if not name:",
        wrong="an option that the call has no use for is accepted and ignored",
    ),
    shared(
        "threads-stay",
        file="attnzoo/evaluation/timing.py",
        old="        torch.set_num_threads(before)",
        new="        torch.set_num_threads(count)",
        wrong="a call leaves its threads to the next one",
    ),
    entered(
        "unread-code",
        old="            code = UNREAD\n",
        new="            code = 0\n",
        wrong="a broken pipe is no failure",
    ),
    entered(
        "errors-as-json",
        old='    if line and "--json" in sys.argv:',
        new="    if not line:",
        wrong="an error of a call for machines is for people alone",
    ),
    entered(
        "narrow-encoding",
        old='stream.reconfigure(errors="replace")',
        new='stream.reconfigure(errors="strict")',
        wrong="a sign that a terminal has not ends the command",
    ),
    Mutant(
        "progress-markup",
        file="attnzoo/cli/progress.py",
        old="markup=False",
        new="markup=True",
        wrong="brackets in names are swallowed by the progress line",
        tests=f"{WRONG} -k progress",
    ),
    Mutant(
        "option-twice",
        file="attnzoo/factory.py",
        old="        if name in options:",
        new="        if not name:",
        wrong="of an option that is given twice the last one counts",
        tests=f"{WRONG} -k mistake",
    ),
    Mutant(
        "place-probe",
        file="attnzoo/reporting/outputs.py",
        old='with tempfile.TemporaryDirectory(prefix=".attnzoo-", dir=parent):',
        new="if parent:",
        wrong="a disk that takes no files is found after the work",
        tests=f"{WRONG} -k disk",
    ),
    prose(
        "prose-fractions",
        old="    text = _fractions(text)\n",
        new="",
        wrong="fractions leak into the terminal",
        tests=f"{TESTS}/cli/test_widths.py -k fractions",
    ),
    choices(
        "choices-case",
        old="    folded = name.casefold()",
        new="    folded = name",
        wrong="a name in another case is not understood",
    ),
    choices(
        "choices-aliases",
        old="        meant.setdefault(alias.casefold(), right)",
        new="        meant.setdefault(alias.casefold(), alias)",
        wrong="the name of a class is suggested in place of its variant's",
    ),
    choices(
        "choices-quiet",
        old='    return f"; did you mean {\' or \'.join(map(repr, near))}?" if near else ""',
        new='    return ""',
        wrong="nothing is suggested",
    ),
    lookalikes(
        "lookalikes-nested",
        old='path.startswith(f"{outer}.")',
        new="path == outer",
        wrong="attention inside attention is counted too",
    ),
    lookalikes(
        "lookalikes-known",
        old="        if not known:",
        new="        if name:",
        wrong="known blocks are said to be unknown",
    ),
    lookalikes(
        "lookalikes-pattern",
        old='"*" if part.isdecimal() else part',
        new="part",
        wrong="each layer is a line of its own",
    ),
    Mutant(
        "cache-bytes-zero",
        file="attnzoo/surgery/convert.py",
        within="cache_bytes",
        old="        refuse_unknown(model)",
        new="        return 0",
        wrong="a model without known blocks is said to hold nothing",
        tests=f"{TESTS}/surgery/test_lookalikes.py -k door",
    ),
    options(
        "options-refused",
        old="if name not in found.refused}",
        new="if name}",
        wrong="options that surgery refuses are shown as its own",
    ),
    tables(
        "tables-fold-numbers",
        old="*(len(cell) for cell in column[1:]), 0)",
        new="0)",
        wrong="numbers are folded, and cut where they have no blanks",
    ),
    tables(
        "tables-last-pair",
        old='        if line:\n            yield line, ""\n',
        new="",
        within="_listed",
        wrong="a narrow list loses what is packed last",
    ),
    tables(
        "tables-first-line",
        old="for n in range(max(1, *(len(part) for part in parts))):",
        new="for n in range(1):",
        wrong="of folded text the first line alone is printed",
    ),
    prose(
        "prose-roles",
        old="    text = _ROLE.sub(",
        new="    _ROLE.sub(",
        wrong="roles leak into the terminal",
    ),
    prose(
        "prose-formula",
        old='    text = text.replace("\\\\|", "‖").replace("\\\\,", " ").replace("\\\\", "")',
        new='    text = text.replace("\\\\|", "‖")',
        wrong="backslashes leak into the terminal",
    ),
    notices(
        "warnings-twice",
        old="        if text not in said:",
        new="        if text:",
        wrong="one warning is said again and again",
    ),
    notices(
        "warnings-stdout",
        old="Console(stderr=True)",
        new="Console()",
        wrong="warnings stand among the results",
    ),
    entry(
        "ctrl-c-silent",
        old="        if code == INTERRUPTED:",
        new="        if code == 1:",
        wrong="Ctrl-C says nothing",
    ),
    outputs(
        "outputs-in-place",
        old='Path(folder) / f"{out.name}.{suffix}"',
        new='out.with_name(f"{out.name}.{suffix}")',
        wrong="files are written where they will be, half of them if it fails",
    ),
    outputs(
        "outputs-unchecked",
        old="    if not parent.is_dir():",
        new="    if False:",
        wrong="a path through a file is found after minutes of work",
    ),
    charts(
        "picture-outlier",
        old="longer > OUTLIER * shorter",
        new="longer > 100 * shorter",
        wrong="one outlier squeezes all other points",
    ),
    charts(
        "picture-most-cut",
        old="cut <= MOST_CUT * len(found)",
        new="cut < len(found)",
        wrong="what is no outlier is cut off",
    ),
    charts(
        "picture-settings",
        old="    with matplotlib.rc_context():",
        new="    if True:",
        wrong="a picture changes how the caller's own pictures look",
    ),
    picture(
        "picture-untold",
        old='is beyond the axis" if told else ""',
        new='is beyond the axis" if told and False else ""',
        wrong="what is beyond the axis is drawn at its edge as though it belonged there",
    ),
    picture(
        "picture-front",
        old="if not best or point[1] < best[-1][1]:",
        new="if not best or point[1] <= best[-1][1]:",
        wrong="rows that another row beats are on the line of the best",
    ),
    labels(
        "picture-labels",
        old="covered = 4 * sum(_common(box, other.box) for other in taken)",
        new="covered = 0.0",
        wrong="labels are written over each other",
    ),
    labels(
        "picture-labels-inside",
        old="covered += 8 * (place.width * place.height - _common(box, self.inside))",
        new="covered += 0",
        wrong="labels leave the axes",
    ),
    looks(
        "picture-looks",
        old='"marker": MARKERS[(number + turn) % len(MARKERS)],',
        new='"marker": MARKERS[number % len(MARKERS)],',
        wrong="lines beyond the eighth have the colour and the marker of another one",
    ),
    ends(
        "picture-ends",
        old="        label.set_y(height)",
        new="        label.set_y(float(y))",
        wrong="labels at the ends of lines are written over each other",
    ),
)
