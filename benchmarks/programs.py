"""Client programs at work, ended in order when the benchmarks are interrupted."""

import subprocess

END_SECONDS = 10.0


def run(*command: object) -> str:
    """What a program prints; it must succeed.

    An interrupted one is asked to end: subprocess.run would kill it, and the processes that fio(1) has started for
    its jobs would stay.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        raise SystemExit(f"benchmarks: {' '.join(words)} ended with {process.returncode}")
    return printed


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
