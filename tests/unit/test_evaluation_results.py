import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from searche1.benchmarks import BENCHMARKS
from searche1.evaluation.compare import AVERAGE, compare, print_comparison
from searche1.evaluation.results import Provenance, search_r1_average, write_results
from searche1.evaluation.scores import SCORES_FILE, Score, read_scores, write_scores
from searche1.evaluation.summary import summarize
from searche1.types import UserError

GREEDY = Provenance(
    model="models/a_b&c",
    method="search",
    data="test.jsonl",
    temperature=0.0,
    top_p=1.0,
    samples=1,
    seed=0,
    last_call_trajectories=10,
    last_call_seconds=2.0,
)


def one(key, em, *, source="nq", sample=0, status="answered", search_r1=None):
    return Score(f"{source}:{key}", source, sample, status, em, em, em, search_r1, 2, 30, 90, "x")


def written(folder, scores, provenance=GREEDY):
    console = Console(file=io.StringIO(), width=200)
    write_results(folder, summarize(scores), scores, provenance, console)
    return console.file.getvalue()


def every_benchmark():
    return [one(i, float(i % 5 < 2), source=b.name) for b in BENCHMARKS for i in range(b.num_questions // 25)]


def test_every_file_says_the_same(tmp_path):
    printed = written(tmp_path, [*(one(i, float(i < 2)) for i in range(4)), one(0, 1.0, source="mine")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["average_em"] == 0.75 and results["overall"]["em"] == 0.6
    rows = {row["source"]: row for row in csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))}
    assert rows.keys() == {"nq", "mine", "all"}
    assert float(rows["nq"]["em"]) == 0.5 and float(rows["nq"]["em_low"]) < 0.5 < float(rows["nq"]["em_high"])
    for text in (printed, (tmp_path / "results.md").read_text(), (tmp_path / "results.tex").read_text()):
        assert "0.750" in text and "NQ" in text and "mine" in text
    assert "4 of the 3,610 questions" in printed
    assert "10 trajectories in 2 s, 5.0/s" in printed


def test_the_papers_rows_stand_beside_ours_with_their_doubts(tmp_path):
    written(tmp_path, every_benchmark())
    markdown = (tmp_path / "results.md").read_text()
    assert "| Search-E1-Instruct | 0.474 | 0.626 | 0.461 | 0.427 | 0.436 | 0.193 | 0.464 | 0.440 |" in markdown
    ours = [line for line in markdown.splitlines() if line.startswith("| this model (search, greedy)")]
    assert len(ours) == 2 and ours[0].endswith(f"| {summarize(every_benchmark()).macro_em:.3f} |")
    assert "0.641 [b]" in markdown and "[b] 0.641 is no multiple of 1/125; it is (35/124 + 1)/2" in markdown
    latex = (tmp_path / "results.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == 3 and "0.641$^b$" in latex


def test_questions_of_no_benchmark_have_no_paper_beside_them(tmp_path):
    written(tmp_path, [one(0, 1.0, source="mine")])
    assert "Search-E1" not in (tmp_path / "results.md").read_text()


def test_a_part_of_the_benchmarks_has_no_average_to_compare(tmp_path):
    written(tmp_path, [one(0, 1.0), one(0, 0.0, source="musique")])
    ours = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| this model")]
    assert ours[0].endswith("| 1.000 | - | - | - | - | 0.000 | - | - |")


def test_samples_have_a_standard_deviation(tmp_path):
    scores = [one(i, float(i < 2 + sample), sample=sample) for i in range(4) for sample in (0, 1)]
    printed = written(tmp_path, scores, replace(GREEDY, temperature=1.0, samples=2))
    assert "search, 2 samples at T=1, top-p 1" in printed
    assert "Average EM of each sample: 0.500, 0.750; standard deviation 0.177." in printed


def test_faults_are_counted_apart_and_told(tmp_path):
    scores = [one(0, 1.0), one(1, 0.0), one(2, 0.0, status="error")]
    printed = written(tmp_path, scores)
    assert "0.500" in printed and "1 trajectories failed" in printed and "1 questions have no other" in printed


def test_search_r1_drops_what_is_behind_its_last_whole_batch(tmp_path):
    scores = [one(i, 1.0, search_r1=float(i < 128)) for i in range(256)]
    rest = [one(i, 1.0, source="bamboogle", search_r1=1.0) for i in range(300)]
    dropped = [one(i, 1.0, source="bamboogle", search_r1=float(i < 256)) for i in range(300)]
    assert search_r1_average(scores + rest) == 0.75
    assert search_r1_average(scores + dropped) == 0.75
    assert search_r1_average([one(0, 1.0)]) is None
    assert "As Search-R1's code takes it, the average EM is 0.750" in written(tmp_path, scores + rest)


# -- two evaluations ------------------------------------------------------------------------------


def test_two_runs_are_compared_question_by_question():
    a = [one(i, float(i < 40)) for i in range(100)] + [one(i, 0.0, source="musique") for i in range(10)]
    b = [one(i, float(i < 60)) for i in range(100)] + [one(i, 0.0, source="musique") for i in range(10)]
    nq, musique, average = compare(a, b)
    assert (nq.source, musique.source, average.source) == ("nq", "musique", AVERAGE)
    assert nq.em_b - nq.em_a == pytest.approx(0.2) and nq.won == 20 and nq.lost == 0
    assert nq.p_value == pytest.approx(2 * 0.5**20) and musique.p_value == 1.0
    assert average.em_b - average.em_a == pytest.approx(0.1) and average.interval[0] > 0


def test_questions_of_only_one_run_and_faults_are_left_out():
    a = [one(0, 1.0), one(1, 0.0), one(2, 1.0, status="error")]
    b = [one(1, 1.0), one(2, 1.0), one(3, 1.0)]
    (nq,) = compare(a, b)
    assert nq.num_questions == 1 and nq.em_a == 0.0 and nq.em_b == 1.0


def test_runs_without_a_common_question_are_refused():
    with pytest.raises(UserError, match="no scored question in common"):
        compare([one(0, 1.0)], [one(1, 1.0)])


def test_the_printed_comparison_says_what_it_means(tmp_path):
    for name, bound in (("a", 40), ("b", 60), ("c", 41)):
        (tmp_path / name).mkdir()
        write_scores(tmp_path / name / SCORES_FILE, [one(i, float(i < bound)) for i in range(100)])

    def printed(a, b):
        console = Console(file=io.StringIO(), width=200)
        print_comparison(tmp_path / a, tmp_path / b, console)
        return console.file.getvalue()

    assert "b is better on these questions by 0.200 EM" in printed("a", "b") and "<0.001" in printed("a", "b")
    assert "a is better" in printed("b", "a")
    assert "do not tell which is better" in printed("a", "c")


def test_scores_survive_their_file_and_a_damaged_one_is_told(tmp_path):
    scores = [one(0, 1.0), one(1, 0.0, search_r1=1.0)]
    write_scores(tmp_path / SCORES_FILE, scores)
    assert read_scores(tmp_path) == scores
    whole = (tmp_path / SCORES_FILE).read_bytes()
    (tmp_path / SCORES_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut or damaged"):
        read_scores(tmp_path)
    with pytest.raises(UserError, match="holds neither"):
        read_scores(tmp_path / "nowhere")
