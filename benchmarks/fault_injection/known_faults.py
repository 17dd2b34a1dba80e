"""The list of known faults, and what shows of each that it is handled: a trial, tests, or the counts of other parts."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fault_injection import faults_of_data as data
from fault_injection import faults_of_folders as folders
from fault_injection.counts import Counts, problem_of
from fault_injection.processes import ROOT


class Tests:
    """Tests show it: names as "file::test", which a parametrised test only begins with."""

    def __init__(self, *names):
        self.names = [f"tests/{name}" for name in names]


class Parts:
    """The counts of other parts of the long run show it."""

    def __init__(self, *names):
        self.names = names


class Untried(str):
    """The reason why it is not tried here."""


class Fault(NamedTuple):
    """A known kind of fault."""

    name: str
    expected: str
    shown_by: Callable | Tests | Parts | Untried  # a function of (bench, folder) gives a problem or None


KERNELS = Untried("no process and no file is part of it; needs a GPU or Triton's interpreter, and has tests of its own")

# Numbers: the fifty faults of the design's reliability notes. Letters: what was found wrong before.
FAULTS = [
    Fault(
        "1 killed while training",
        "the same bits",
        Parts("kills-hyma", "kills-grid", "kills-halving", "kills-closed"),
    ),
    Fault(
        "2 killed between write and rename",
        "the old file; the new one later removed",
        Parts("kills-hyma", "kills-grid"),
    ),
    Fault("3 killed between two renames", "never a mix", Parts("kills-hyma", "kills-grid")),
    Fault(
        "4 newest checkpoint cut",
        "the one before it",
        Tests("test_train_hyma.py::test_a_damaged_checkpoint_has_a_predecessor"),
    ),
    Fault("5 a byte of a run flipped", "named, or the same result", Parts("damage-run")),
    Fault("6 disk full", "the old file is kept", Tests("test_files.py::test_a_full_disk_leaves_the_old_file")),
    Fault("7 no folder to write to", "one line", folders.no_folder_to_write),
    Fault(
        "8 two processes on a folder",
        "the second is refused",
        Tests(
            "test_files.py::test_lock_keeps_a_second_process_out",
            "test_runs.py::test_a_run_folder_belongs_to_one_run_and_one_process",
        ),
    ),
    Fault(
        "9 resumed with other flags",
        "the flag is named",
        Tests("test_train_hyma.py::test_resume_of_a_finished_run_and_contradictions"),
    ),
    Fault("10 resumed at the end", "trains nothing", folders.typed_again),
    Fault(
        "11 a newer format",
        "refused by version",
        Tests("test_embeddings.py::test_faults_of_rows_and_manifest_are_named"),
    ),
    Fault("12 file modes", "the umask's", folders.permissions),
    Fault("13 two checkpoints while saving", "one can always be read", Parts("kills-hyma", "kills-grid")),
    Fault("14 killed while embedding", "the same bytes", Parts("kills-embed")),
    Fault("14b killed while evaluating", "the same report", Parts("kills-evaluate")),
    Fault("15 an unsealed folder", "refused", Tests("test_embeddings.py::test_faults_of_rows_and_manifest_are_named")),
    Fault("16 a bad shard", "made again", Tests("test_embed.py::test_a_bad_shard_is_made_again")),
    Fault(
        "17 encoders of other rows",
        "refused",
        Tests("test_embeddings.py::test_faults_of_rows_and_manifest_are_named"),
    ),
    Fault("18 rows permuted", "refused", Tests("test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte")),
    Fault("19 a few bytes that say they are many rows", "refused at once", folders.expanded_view),
    Fault("20 zero rows", "refused", Tests("test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte")),
    Fault(
        "21 other types and layouts",
        "refused",
        Tests("test_vlm.py::test_connectors_that_are_no_plain_numbers_are_refused"),
    ),
    Fault("22 NaN in a row", "refused", Tests("test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte")),
    Fault(
        "23 other weights than recorded",
        "refused",
        Tests("test_weights.py::test_a_connector_is_not_stitched_to_other_weights"),
    ),
    Fault("24 repeated captions", "counted", data.repeated_captions),
    Fault("25 no rows", "one line", data.no_rows),
    Fault("26 one and three processes", "the same bytes", Tests("test_embed.py::test_shards_of_several_processes")),
    Fault("27 a tar that is cut", "counted", Tests("test_sources.py::test_a_cut_archive_costs_its_end_and_says_so")),
    Fault(
        "28 a prefix over two tars",
        "not merged",
        Tests("test_sources.py::test_archives_that_end_and_begin_with_one_name_are_not_mixed"),
    ),
    Fault("29 unreadable pictures", "quarantined for all encoders", Tests("test_embed.py::test_quarantine")),
    Fault(
        "30 a picture that breaks after the scan",
        "stops",
        Tests("test_embed.py::test_a_picture_that_breaks_after_the_scan_stops_the_run"),
    ),
    Fault("31 pictures of 100 and 182 megapixels, and thin ones", "refused at the header", data.bombs),
    Fault("32 every mode", "upright RGB", Tests("test_vlm.py::test_pictures_of_every_mode_become_upright_rgb")),
    Fault("33 other formats", "not opened", data.other_formats),
    Fault("34 odd captions", "no row shifts", data.odd_captions),
    Fault("35 captions that are addresses", "text", Tests("test_vlm.py::test_captions_are_text_to_a_multimodal_model")),
    Fault("36 a third of the pictures missing", "stops", data.many_missing),
    Fault(
        "37 a loss that is not finite",
        "stops, nothing of it is saved",
        Tests("test_train_hyma.py::test_a_loss_that_is_not_finite_saves_nothing_of_it"),
    ),
    Fault(
        "38 one pair's loss is not finite",
        "the pair is named",
        Tests("test_train_grid.py::test_a_loss_that_is_not_finite_saves_nothing_of_it"),
    ),
    Fault("39 a row of length zero", "finite", KERNELS),
    Fault("40 scale at its limit, one row, equal pairs", "finite", KERNELS),
    Fault("41 seeds", "the same seed, the same bytes", folders.two_seeds),
    Fault("42 kernels against the reference", "within the bound", KERNELS),
    Fault("43 outputs that nobody wrote", "none", KERNELS),
    Fault("44 odd shapes", "as the reference", KERNELS),
    Fault("45 wrong arguments", "named", Tests("test_kernels_arguments.py::test_bad_arguments_are_named")),
    Fault("46 no GPU, no triton", "one line", Tests("test_kernels_arguments.py::test_impl")),
    Fault(
        "47 code in a file",
        "never runs",
        Tests("test_vlm.py::test_damaged_and_hostile_files_are_refused", "test_forbidden_calls.py"),
    ),
    Fault(
        "48 names that lead elsewhere",
        "refused",
        Tests("test_embeddings.py::test_an_encoder_of_a_manifest_has_a_name_that_can_be_a_files"),
    ),
    Fault("48b pictures of a stranger's rows that lie elsewhere", "not shown", folders.picture_elsewhere),
    Fault(
        "49 signals",
        "saved; 143, 130, 152; the same bits",
        Parts(
            "signals-embed",
            "signals-hyma",
            "signals-grid",
            "signals-halving",
            "signals-closed",
            "signals-evaluate",
        ),
    ),
    Fault("50 out of memory", "the flag is named", Tests("test_files.py::test_running_out_of_memory_names_the_flags")),
    Fault(
        "A1 weights that do not fit",
        "refused",
        Tests("test_weights.py::test_weights_that_leave_tensors_random_are_refused"),
    ),
    Fault(
        "A2 --from",
        "that run's data",
        Tests("test_train_grid.py::test_from_takes_the_data_and_the_split_of_its_run"),
    ),
    Fault("A3 a stray quote", "no row is lost unsaid", data.stray_quote),
    Fault(
        "A4 tables and captions below the folder",
        "read, with the folder's split",
        Tests("test_corpora.py::test_tables_below_the_folder", "test_corpora.py::test_captions_in_another_folder"),
    ),
    Fault(
        "A5 folders of splits in other spellings",
        "no classes",
        Tests(
            "test_corpora.py::test_folders_of_splits_are_no_classes",
            "test_corpora.py::test_a_folder_around_the_classes_is_no_class",
        ),
    ),
    Fault("A6 the first record lacks a column", "the others keep it", data.late_split),
    Fault("A7 other names of splits", "known or named", data.unknown_split),
    Fault("A8 several captions in a record", "a row each", data.lists_of_captions),
    Fault("A9 a picture under several paths", "one picture", data.spellings_of_a_picture),
    Fault(
        "A10 hidden files, links, other formats in folders",
        "skipped, followed, named",
        Tests("test_corpora.py::test_hidden_files_links_and_other_formats"),
    ),
    Fault("A11 labels of several types", "one class, NaN is none", data.labels_of_several_types),
    Fault("D labels and splits that are not UTF-8", "read or quarantined", data.odd_labels),
    Fault("A12 errors of the machine", "stop", data.open_file_limit),
    Fault("A13 pictures repaired after the scan", "scanned again", data.repaired_pictures),
    Fault(
        "A14 connectors that are not finite",
        "refused",
        Tests("test_evaluate.py::test_a_connector_that_is_not_finite_is_named"),
    ),
    Fault(
        "A14b a ledger and a configuration that no run has",
        "refused",
        Tests(
            "test_runs.py::test_a_damaged_run_is_refused",
            "test_train_grid.py::test_from_takes_the_data_and_the_split_of_its_run",
        ),
    ),
    Fault(
        "A15 another picture, another split, another text model",
        "refused",
        Tests(
            "test_corpora.py::test_a_row_is_bound_to_its_picture",
            "test_embed.py::test_a_picture_exchanged_after_the_scan_stops_the_run",
            "test_train_grid.py::test_a_run_meets_no_other_split_of_its_rows",
        ),
    ),
    Fault(
        "A17 answers of other spellings, bad questions, a set that is not whole",
        "one answer, one row, said",
        Tests("test_corpora.py::test_answers_are_normalised_and_bad_questions_cost_one_row", "test_standard_sets.py"),
    ),
    Fault(
        "A18 a picture twice in the sample",
        "once",
        Tests("test_corpora.py::test_the_sample_keeps_one_of_two_equal_pictures"),
    ),
    Fault(
        "A19 an encoder's file lost after sealing",
        "embedded again",
        Tests("test_embed.py::test_a_file_that_was_lost_or_cut_is_embedded_again"),
    ),
    Fault("B1 a card that names a local folder", "refused", folders.local_card),
    Fault("B3 .lock as a link or a pipe", "neither followed nor waited for", folders.linked_lock),
    Fault("B3b folders as links", "nothing is written behind them", folders.linked_folders),
    Fault(
        "B4 thin pictures",
        "refused",
        Tests("test_vlm.py::test_a_thin_picture_is_refused_before_it_fills_the_memory"),
    ),
    Fault(
        "C signals while torch is imported",
        "130 in one line, ignored, 143",
        Tests("test_files.py::test_signals_while_torch_is_imported_show_no_traceback"),
    ),
    Fault(
        "C a text model without tokenizer or weights",
        "embedded",
        Tests("test_vlm.py::test_text_models_that_are_no_transformers"),
    ),
    Fault("C prompts without their encoder", "said before the scoring, or left out", folders.prompts_without_encoder),
    Fault("D odd values of flags", "one line", folders.bad_values),
    Fault("D odd run folders", "refused", folders.odd_run_folders),
    Fault(
        "D degenerate data",
        "a ranking or one line",
        Tests(
            "test_train_hyma.py::test_degenerate_data_end_with_a_ranking_or_one_line",
            "test_selectors.py::test_a_constant_encoder_agrees_with_nothing",
        ),
    ),
    Fault(
        "E tables of every separator, encoding and heading",
        "read, or what to do",
        Tests(
            "test_corpora.py::test_other_delimiters",
            "test_corpora.py::test_other_encodings",
            "test_corpora.py::test_tables_that_cannot_be_read_say_what_to_do",
        ),
    ),
    Fault("E paths of other machines", "read", Tests("test_corpora.py::test_paths_as_other_machines_write_them")),
    Fault(
        "E several encoders missing",
        "each named, the others embedded",
        Tests("test_embed.py::test_encoders_that_can_be_loaded_are_embedded_beside_those_that_cannot"),
    ),
]


def known_faults(bench, parts):
    """Tries every known fault. parts: {part: its counts in the JSON}, as far as they have run."""
    counts = Counts(len(FAULTS))
    passed = run_tests()
    table = {}
    for number, fault in enumerate(FAULTS):
        folder = bench.fresh_folder(f"fault-{number}")
        outcome, why = outcome_of(fault.shown_by, bench, folder, parts, passed)
        table[fault.name] = {"expected": fault.expected, "outcome": outcome, "why": why}
        if outcome != "not tried":
            counts.add(fault.name, why)
    counts.more = {"table": table}
    return counts


def outcome_of(shown_by, bench, folder, parts, passed):
    """("held", "not held" or "not tried", why). passed: {test: whether it passed}."""
    match shown_by:
        case Untried():
            return "not tried", shown_by
        case Tests():
            return outcome_of_tests(shown_by.names, passed)
        case Parts():
            return outcome_of_parts(shown_by.names, parts)
    problem = problem_of(shown_by, bench, folder)
    return ("not held", problem) if problem else ("held", None)


def outcome_of_parts(names, parts):
    for name in names:
        if name not in parts:
            return "not tried", f"{name} was not run"
    bad = [f"{name}: {parts[name]['not_held']} of {parts[name]['tried']}" for name in names if parts[name]["not_held"]]
    return ("not held", "; ".join(bad)) if bad else ("held", None)


def outcome_of_tests(names, passed):
    for name in names:
        found = [outcome for test, outcome in passed.items() if test.startswith(name)]
        if not found:
            return "not tried", f"{name} was not run"
        if not all(found):
            return "not held", f"{name} fails"
    return "held", None


def run_tests():
    """{test: whether it passed} of the tests that FAULTS names; a skipped one is left out."""
    names = set()
    for fault in FAULTS:
        if isinstance(fault.shown_by, Tests):
            names.update(fault.shown_by.names)
    passed = {}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        command = [sys.executable, "-m", "pytest", *options, *sorted(names)]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for case in xml.parse(results).iter("testcase"):
            ended = {child.tag for child in case}
            if "skipped" not in ended:
                name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
                passed[name] = not ended & {"failure", "error"}
    return passed
