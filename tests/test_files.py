"""Files and locks. Ground truth: what a second process, and a process without POSIX modules, may do."""

import os
import subprocess
import sys

import pytest
from support import fresh_python

from retro_np.errors import UserError
from retro_np.files import locked, visible

HOLD = """
import time
from retro_np.files import locked
with locked({!r}, "build"):
    print("held", flush=True)
    time.sleep(60)
"""
WITHOUT_POSIX = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"


def test_a_folder_is_locked_by_one_process_and_free_after_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD.format(str(tmp_path))], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another build: wait for it, or give another folder"):
            locked(tmp_path, "build").__enter__()
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path, "build"):
        pass


def test_the_lock_also_holds_within_a_process_and_its_file_is_hidden(tmp_path):
    with locked(tmp_path / "new", "edit"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
        assert list(visible(tmp_path / "new")) == []
        with pytest.raises(UserError, match="is in use by another edit"):
            locked(tmp_path / "new", "edit").__enter__()


def test_an_error_within_the_lock_frees_it(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "edit"):
        raise ZeroDivisionError
    with locked(tmp_path, "edit"):
        pass


def test_without_fcntl_and_resource_files_are_written_and_folders_are_locked(tmp_path):
    code = f"""
import warnings; warnings.simplefilter("ignore")  # filelock says that it uses lock files
from retro_np.errors import UserError
from retro_np.files import allow_open_files, locked, write_json
allow_open_files(10**6)
with locked({str(tmp_path)!r}, "build"):
    write_json({str(tmp_path / "a.json")!r}, [1])
    try:
        locked({str(tmp_path)!r}, "build").__enter__()
    except UserError as error:
        print(error)
with locked({str(tmp_path)!r}, "build"):
    print("free again")
"""
    out, err, status = fresh_python(WITHOUT_POSIX + code)
    assert (err, status) == ("", 0)
    refusal, free = out.splitlines()
    assert refusal == f"{tmp_path} is in use by another build: wait for it, or give another folder"
    assert free == "free again"
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]\n"


def test_a_missing_filelock_is_reported_in_one_line_with_the_command_that_installs_it(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    command = ["build", str(tmp_path / "a.txt"), "-o", str(tmp_path / "db"), "--embedder", "hashing", "--held-out", "0"]
    code = f"""
import sys; sys.modules["filelock"] = None
sys.argv[1:] = {command}
from retro_np.cli import main
main()
"""
    assert fresh_python(code) == ("", "retro-np needs filelock: pip install filelock\n", 2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of open files")
def test_the_limit_of_open_files_is_raised_as_far_as_the_system_allows():
    code = """
import resource
from retro_np.files import allow_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
allow_open_files(100)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    assert fresh_python(code)[0] == "100"
