"""What bash completes after `hft`, by the script that `hft completion bash` prints."""

import subprocess

import pytest

from hft.cli import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "hft.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["s"], {"sft", "schema"}),
        (["sft", "--learning_ra"], {"--learning_rate", "--learning_rate_factor"}),
        (["sft", "--config", "recipes/tiny/sf"], {"recipes/tiny/sft.yaml"}),
        (["sft", "--config", "recipes/tiny/sft.yaml", "--kl_to_b"], {"--kl_to_base"}),
        (["eval", "runs/one", "--suite", "q"], {"quick"}),
        (["plan", "sft", "--gpu_m"], {"--gpu_memory"}),
        (["verify", "--ba"], {"--base"}),
    ],
)
def test_commands_flags_values_and_files_are_completed(script, typed, expected):
    asked = f'source {script}; COMP_WORDS=(hft "$@"); COMP_CWORD=$#; _shtab_hft; echo "${{COMPREPLY[@]}}"'
    run = subprocess.run(["bash", "-c", asked, "bash", *typed], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == expected
