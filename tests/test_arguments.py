"""arguments.py: what is refused before models load, and docs/trainer_arguments.md."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers

from arguments import REFUSED, RecognitionArguments, TrainingArguments, check_evaluation
from command import InputError, parse_arguments
from manifest import Utterance

PAGE = Path(__file__).parents[1] / "docs" / "trainer_arguments.md"
ROW = re.compile(r"^`(\w+)` \| (as in transformers|differs|no effect|refused) \|", re.MULTILINE)
TABLE = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
REQUIRED = "--llm_model_name_or_path llm --whisper_model_name_or_path whisper --data_path m.jsonl"
EVALUATION = "--eval_data_path dev.jsonl --eval_strategy steps --eval_steps 1"
# of flags that are on by default, or take no True
VALUES = {
    "average_tokens_across_devices": "False",
    "dataloader_in_order": "False",
    "eval_do_concat_batches": "False",
    "include_for_metrics": "inputs",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5",
}


def parse(options: str, *more: str) -> TrainingArguments:
    given = f"{REQUIRED} --output_dir out --report_to none {options}".split()
    return parse_arguments(TrainingArguments, [*given, *more])


def test_the_table_in_docs_has_every_argument_of_the_trainer():
    assert list(TABLE) == sorted(x.name for x in dataclasses.fields(transformers.TrainingArguments))
    assert REFUSED.keys() <= {name for name, here in TABLE.items() if here == "refused"}


@pytest.mark.parametrize("flag", [name for name, here in TABLE.items() if here == "refused"])
def test_what_the_table_calls_refused_is_refused_in_one_line(flag):
    with pytest.raises(InputError, match=f"^(argument )?--{flag}.*(is refused|invalid)") as refused:
        parse(f"--{flag} {VALUES.get(flag, True)}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flag", ["include_num_input_tokens_seen", "push_to_hub"])
def test_a_refused_flag_may_be_given_as_it_is_by_default(flag):
    parse(f"--{flag} False")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--load_best_model_at_end True", "needs --eval_strategy"),
        ("--save_strategy best", "--save_strategy best needs --eval_strategy"),
        (f"--save_strategy best {EVALUATION}", "best needs --metric_for_best_model, such as loss"),
        ("--eval_on_start True", "--eval_on_start needs --eval_data_path"),
        ("--dataloader_prefetch_factor 2 --dataloader_num_workers 0", "needs --dataloader_num_w"),
        ("--ddp_backend gloo", "--ddp_backend needs torchrun"),
        ("--optim lomo", "--optim lomo, .*pip install lomo-optim"),
        ("--optim_args x", "--optim_args x: not enough values"),
        ("--lr_scheduler_type cosine_with_min_lr", "cosine_with_min_lr, .*: One of min_lr or"),
        ("--lr_scheduler_kwargs x=1", "--lr_scheduler_kwargs x=1 is neither JSON nor a file"),
        ('--lr_scheduler_kwargs {"x":1}', "unexpected keyword argument 'x'"),
        ('--accelerator_config {"x":1}', "--accelerator_config: .*unexpected keyword argument 'x'"),
        ('--accelerator_config {"split_batches":true}', "split_batches True is refused"),
        ("--report_to foo", "--report_to foo: not installed"),
    ],
)
def test_what_would_end_in_a_traceback_is_refused_at_the_start(options, message):
    with pytest.raises(InputError, match=message):
        parse(options)


@pytest.mark.parametrize("flag", ["encoder_cache", "resume_from_checkpoint", "deepspeed"])
def test_an_empty_value_is_not_taken_for_none(flag):
    with pytest.raises(InputError, match=f"--{flag} is empty: give a value, or leave it out"):
        parse("", f"--{flag}", "")


def test_an_empty_value_is_not_taken_for_none_in_recognition():
    given = "--projector_model_path p --data_path m.jsonl --result_path r"
    with pytest.raises(InputError, match="--encoder_cache is empty"):
        parse_arguments(RecognitionArguments, [*given.split(), "--encoder_cache", ""])


def test_a_beam_that_is_given_twice_is_decoded_once():
    given = "--projector_model_path p --data_path m.jsonl --result_path r --num_beams 5 1 5"
    args = parse_arguments(RecognitionArguments, given.split())
    assert args.num_beams == [5, 1]


def test_an_empty_prompt_and_seed_0_are_values():
    args = parse("--seed 0 --data_seed 0 --ctc_weight 0 --ctc_first 0", "--prompt", "")
    assert (args.prompt, args.seed, args.data_seed) == ("", 0, 0)
    assert (args.ctc_weight, args.ctc_first) == (0, 0)


@pytest.mark.parametrize(
    "spelling, name, greater",
    [
        ("wer", "wer", False),
        ("WER %", "wer", False),
        ("eval_WER %", "wer", False),
        ("eval_CER", "cer", False),
        ("substitutions", "substitutions", False),
        ("eval_loss", "loss", False),
        ("listening_gap", "listening_gap", True),
    ],
)
def test_lower_is_better_for_errors_under_all_spellings(spelling, name, greater):
    args = parse(EVALUATION, "--metric_for_best_model", spelling)
    assert (args.metric_for_best_model, args.greater_is_better) == (name, greater)
    overruled = parse(f"{EVALUATION} --greater_is_better True", "--metric_for_best_model", spelling)
    assert overruled.greater_is_better is True


def evaluate(options: str, text: str = "go up", count: int = 8) -> None:
    args = parse(f"{EVALUATION} {options}")
    check_evaluation(args, [Utterance("a.wav", 1.0, text)] * count)


def test_a_metric_that_evaluation_will_not_have_is_refused_with_the_names_there_are():
    evaluate("--metric_for_best_model wer --eval_hypotheses 4")
    evaluate("--metric_for_best_model cer --eval_hypotheses 4", "今天天气")
    evaluate("--metric_for_best_model listening_gap")
    cases = {
        "--metric_for_best_model cer --eval_hypotheses 4": "will have loss, listening_gap, wer, su",
        "--metric_for_best_model wer": "will have loss, listening_gap; error rates need --eval_hy",
        "--metric_for_best_model wer --eval_hypotheses 4 --prediction_loss_only True": "have loss;",
        "--metric_for_best_model listening_gap --per_device_eval_batch_size 1": "have loss; error",
    }
    for options, message in cases.items():
        with pytest.raises(InputError, match=message):
            evaluate(options)


def test_a_set_of_which_drop_last_leaves_nothing_is_refused():
    evaluate("--dataloader_drop_last True")
    with pytest.raises(InputError, match="leaves nothing of the 7 utterances in --eval_data_path"):
        evaluate("--dataloader_drop_last True", count=7)
