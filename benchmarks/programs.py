"""Client programs at work, ended in order when the benchmarks are interrupted or nothing comes of them."""

import subprocess

LONGEST_SECONDS = 180.0
END_SECONDS = 10.0


class Failed(Exception):
    """A contender did not do its work; the text says what happened."""


def run(*command: object) -> str:
    """What a program prints. Raises Failed where it does not succeed.

    It is asked to end, not killed as by subprocess.run: the processes that fio(1) starts for its jobs would stay.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            raise Failed(f"{' '.join(words)} took longer than {LONGEST_SECONDS:.0f} s") from None
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        raise Failed(f"{' '.join(words)} ended with {process.returncode}")
    return printed


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
