"""What is cited from the paper stands there: a table of statements and their sections, against code and docs.

A citation can be wrong in two ways: the paper has no such section, table or figure, or the statement stands
in another one. A *passage* is what a reader takes in as one: in code a docstring, or a statement with its
comments; on a page a paragraph, a point of a list or a row of a table."""
import dataclasses
import io
import pathlib
import re
import tokenize

import pytest

import train

ROOT = pathlib.Path(__file__).parents[1]
FILES = [path for pattern in ("*.py", "util/*.py", "experiment/*.py", "tests/**/*.py", "*.md", "docs/**/*.md")
         for path in sorted(ROOT.glob(pattern)) if path.name != pathlib.Path(__file__).name]
PAPER = {*(f"Sect. {n}" for n in ("1", "3", "3.1", "3.2", "3.3", "4", "4.1", "4.2", "4.3", "5", "6")),
         *(f"Table {n}" for n in range(1, 6)), *(f"Fig. {n}" for n in range(1, 8))}

# The statement, where the paper has it, the files that must cite it, and how one recognises it there.
STATEMENTS = [("arch2 is the static network", "Sect. 3.1", "dyncell.py", r"arch2 of \[18\]"),
    ("five inputs of a cell", "Sect. 3.1", "dyncell.py", r"the pool at first|five inputs"),
    ("a cell's dec goes into the next frame's cell", "Sect. 3.1", "train.py", r"recurrence"),
    ("a string of tokens", "Sect. 3.2", "dyncell.py controller.py", r"string of (five|5L) tokens"),
    ("operations", "Table 1", "ops.py", r"every operation\b|operations\."),
    ("aggregations", "Table 2", "ops.py", r"every aggregation\b|aggregations of two maps"),
    ("sample, train, score, reward", "Sect. 3.3", "controller.py", r"reward train the controller"),
    ("the reward", "Sect. 3.3", "data.py train.py docs/glossary.md EXERCISES.md", r"geometric mean"),
    ("sequences", "Sect. 4", "data.py train.py", r"consecutive frames|three labelled frames"),
    ("the summed loss", "Sect. 4", "train.py", r"sum up cross-entropy"),
    ("meta-train and meta-val", "Sect. 4.1", "data.py", r"disjoint split"),
    ("outputs are computed once", "Sect. 4.1", "train.py", r"pre-compute all"),
    ("padded to 400", "Sect. 4.1|Sect. 4.2", "data.py dyncell.py train.py", r"480x400|pad.{,60}\b400\b"),
    ("the LSTM", "Sect. 4.1", "controller.py", r"[Tt]wo-layer LSTM|LSTM's size|100 hidden units"),
    ("PPO", "Sect. 4.1", "controller.py docs/ppo.md", r"proximal policy|PPO and its rate|rate of\s1e-4"),
    ("L = 5 and 4", "Sect. 4.1", "controller.py train.py", r"L is 5|layers of a cell, L"),
    ("the early stop", "Sect. 4.1", "controller.py train.py", r"half way|un-promising"),
    ("rewards over the search", "Fig. 3", "experiment/figures.py", r"reward of every candidate"),
    ("sampled shares", "Fig. 4", "experiment/figures.py", r"shares of operations"),
    ("the cell alone, then both", "Sect. 4.2", "train.py", r"the cell alone\b|best cells on"),
    ("diagrams of cells", "Fig. 7", "experiment/figures.py", r"as a (wiring )?diagram"),
    ("mIoU", "Table 3|Table 4", "experiment/table.py experiment/figures.py train.py", r"mIoU|network on val"),
    ("parameters, time", "Table 5", "dyncell.py experiment/table.py", r"parameters(,| and) (multiply|time)"),
    ("time of a clip", "Table 5", "experiment/table.py docs/glossary.md", r"baseline on the first frame"),
    ("pre-training's rates", "Sect. 6", "train.py", r"\bpoly\b.*|a rate each"),
    ("auxiliary losses", "Sect. 6", "train.py dyncell.py", r"auxiliary (losses|adds)"),
    ("scale, zero-padding", "Sect. 6", "data.py", r"zero-padding")]
# Every field of the recipe that cites the paper.
FIELDS = {
    "3.1": "static_network", "4": "sequence_length",
    "4.1": "search_strategy input_longer_side input_crop input_pad cell_layers meta_val_share search_epochs "
           "search_batch early_stop early_stop_rule controller_lr",
    "4.1 4.2": "cell_lr",
    "4.2": "momentum cell_epochs cell_batch end_epochs end_lr_cell end_lr_static end_crop cells",
    "6": "static_epochs static_batch static_crop static_scale static_lr_encoder static_lr_decoder "
         "static_rate poly_power auxiliary_weight"}


def cited(text):
    """What a text cites: "Sect. 3.3, 4.1; Table 3" -> {"Sect. 3.3", "Sect. 4.1", "Table 3"}"""
    number, found = r"\d+(?:\.\d+)*", set()
    for kind in ("Sect", "Table", "Fig"):
        for numbers in re.findall(rf"\b{kind}s?\.?\s+({number}(?:(?:, | and | to |, and ){number})*)", text):
            found |= {f"{kind}{'' if kind == 'Table' else '.'} {n}" for n in re.findall(number, numbers)}
    return found


def passages(path):
    """The passages of a file, each on one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        found = re.split(r"\n\s*\n|\n(?=\||\s*[-*] )", text)
    else:
        found, start, lines = [], 0, text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            behind = token.type == tokenize.COMMENT and token.line.strip()[0] != "#"
            if behind or token.type == tokenize.NEWLINE:          # a statement ends, or a line with a comment
                found.append("\n".join(lines[start:token.end[0]]))
                start = token.end[0]
    return [re.sub(r"[\s#]+", " ", passage) for passage in found]


def sentences(passage):
    """Sentences of a passage; "Sect. 4.1" ends none."""
    return re.split(r"(?<!Sect)(?<!Fig)(?<!Figs)(?<! [18\]])[.;?!]['\")]*\s+", passage)


PASSAGES = {path.relative_to(ROOT).as_posix(): passages(path) for path in FILES}


@pytest.mark.parametrize("statement, section, files, pattern", STATEMENTS, ids=[row[0] for row in STATEMENTS])
def test_a_statement_is_cited_from_where_the_paper_has_it(statement, section, files, pattern):
    right = set(section.split("|"))
    for name in files.split():
        found = [passage for passage in PASSAGES[name] if re.search(pattern, passage)]
        assert any(cited(passage) & right for passage in found), f"{name}: {section} is not cited: {found}"
    for name, all_of_file in PASSAGES.items():           # and nobody cites it from anywhere else
        for sentence in (sentence for passage in all_of_file for sentence in sentences(passage)):
            others = {name for name in cited(sentence) if name.startswith(section[:3])}
            if others and re.search(pattern, sentence):
                assert others & right, f"{name}: {section}, not {others}: {sentence}"


def test_a_field_of_the_recipe_cites_the_section_that_has_it():
    expected = {name: sections for sections, names in FIELDS.items() for name in names.split()}
    for field in dataclasses.fields(train.Recipe):
        sections = sorted(one.split()[1] for one in cited(field.metadata["help"]))
        assert " ".join(sections) == expected.get(field.name, ""), field.name
        marks = [word for word in ("[ours]", "[18]") if word in field.metadata["help"]]
        assert sections or marks or field.name in ("dataset", "seed"), f"{field.name}: says whose it is"


@pytest.mark.parametrize("name", PASSAGES)
def test_only_what_the_paper_has_is_cited(name):
    assert cited("; ".join(PASSAGES[name])) <= PAPER
