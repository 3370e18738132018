"Workers that may die: order, accidents, ends from outside, and a machine that is short of something"
import os, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest

from strip_notebooks import processes
from strip_notebooks.processes import Died, WorkerError, parallel_map, remove_worker_files, run_in_worker, worker_results


def until(condition, seconds=60):
    "What `condition` gives as soon as it is true"
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end: time.sleep(.005)
    return found


def start(code, *args, **kwargs):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=dict(os.environ, STRIP_PROGRESS='none'), **kwargs)


def work(item):
    "What a worker does: note that it did, and now and then an accident"
    folder,i,accident = item
    if i == 3 and accident == 'once' and not os.path.exists(f'{folder}/killed'):
        open(f'{folder}/killed', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 3 and accident == 'always': os.kill(os.getpid(), signal.SIGKILL)
    if accident == 'slow': time.sleep(.2)
    open(f'{folder}/done{i}', 'w').close()
    return i


def items(folder, accident, n=9): return [(str(folder), i, accident) for i in range(n)]


def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    assert list(parallel_map(work, items(tmp_path, 'once'), workers=2)) == list(range(9))             # as when the memory ran out
    found = list(parallel_map(work, items(tmp_path, 'always'), workers=2, died=lambda item, how: (item[1], how)))
    assert found == [0, 1, 2, (3, 'memory'), 4, 5, 6, 7, 8]
    kept = []
    with pytest.raises(WorkerError, match='item 4 of 9 was killed'):
        for i in parallel_map(work, items(tmp_path, 'always'), workers=2): kept.append(i)
    assert kept == [0, 1, 2]


def wait_a_little(item):
    "The item, the sooner the later it comes"
    time.sleep(max(0, .3 - .03*item))
    return item


def test_results_are_in_order(): assert list(parallel_map(wait_a_little, range(20), workers=2)) == list(range(20))


def number_of(item): return os.getpid(), item


def be_alone(folder):
    "Fails if another does the same at the same time"
    os.mkdir(f'{folder}/here')
    time.sleep(.01)
    os.rmdir(f'{folder}/here')


def test_no_more_workers_than_asked_for(tmp_path):
    assert len({p for p,_ in parallel_map(number_of, range(40), workers=3)}) <= 3
    assert list(parallel_map(be_alone, [str(tmp_path)]*20, workers=1)) == [None]*20
    with pytest.raises(FileExistsError): list(parallel_map(be_alone, [str(tmp_path)]*200, workers=3))


def test_an_idle_worker_that_is_killed_is_replaced():
    pids = {p for p,_ in parallel_map(number_of, range(9), workers=2)}
    for p in pids:
        os.kill(p, signal.SIGKILL)
        assert until(lambda: not psutil.pid_exists(p) or psutil.Process(p).status() == 'zombie')
    found = list(parallel_map(number_of, range(9), workers=2))
    assert [i for _,i in found] == list(range(9)) and not pids & {p for p,_ in found}


def test_two_threads_share_the_workers(tmp_path):
    "One of them has an item that kills its worker, for which the other's are stopped too"
    found = {}
    def go(name, accident): found[name] = list(parallel_map(work, items(tmp_path, accident, 30), workers=2, died=lambda item, how: how))
    threads = [threading.Thread(target=go, args=a) for a in (('a', 'none'), ('b', 'always'))]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert found == dict(a=list(range(30)), b=[0, 1, 2, 'memory', *range(4, 30)])


def nap(seconds):
    time.sleep(seconds)
    return seconds


def test_after_calls_that_were_given_up_the_next_one_ends():
    "Canceled items would have their workers ended later, together with an item of the next call, which waited for ever"
    naps = [.01 + .0025*((7*k) % 20) for k in range(60)]
    def go():
        for k in range(30):
            given_up = worker_results(nap, naps[k:k + 20], 4)
            for _ in range(1 + k % 4): next(given_up)
            given_up.close()
            assert list(worker_results(nap, [.03]*6, 4)) == [.03]*6
        ended.append(True)
    ended = []
    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(120)
    assert ended


def unpicklable(item): return threading.Lock()
def not_to_be_unpickled(item): raise subprocess.CalledProcessError(1, 'x') if item else WorkerErrorOfTwo(1, 2)
class WorkerErrorOfTwo(Exception):
    def __init__(self, a, b): super().__init__(a)


def test_what_cannot_cross_processes_is_an_error_of_its_item():
    with pytest.raises(TypeError): list(parallel_map(unpicklable, [1], workers=2))
    with pytest.raises(WorkerError, match='WorkerErrorOfTwo'): list(parallel_map(not_to_be_unpickled, [0], workers=2))
    with pytest.raises(Exception, match='pickle'): list(parallel_map(lambda x: x, [1], workers=2))
    assert run_in_worker(abs, -3) == 3


def large(n): return bytes(n)


def test_large_items_and_results(): assert [len(b) for b in worker_results(large, [30*2**20]*6, 2)] == [30*2**20]*6


def test_a_consumer_that_stops_early_leaves_workers_that_work(tmp_path):
    for i in parallel_map(work, items(tmp_path, 'slow', 40), workers=2):
        if i == 2: break
    del i
    assert run_in_worker(abs, -3) == 3
    assert len(list(tmp_path.iterdir())) < 40


MAP = ("import sys; sys.path.insert(0, sys.argv[1]); from test_processes import parallel_map, work, items\n"
       "for i in parallel_map(work, items(sys.argv[2], 'slow', 200), workers=2): pass")


def alive(group):
    "The processes of a group that run"
    listed = subprocess.run(['ps', '-eo', 'pid,pgid,stat'], capture_output=True, text=True).stdout.splitlines()[1:]
    return [l for l in listed if l.split()[1] == str(group) and l.split()[2][0] != 'Z']


@pytest.mark.parametrize('sent,times', [(signal.SIGINT, 1), (signal.SIGINT, 3), (signal.SIGKILL, 1), (signal.SIGTERM, 1)])
def test_an_end_from_outside_leaves_no_process_behind(tmp_path, sent, times):
    "Ctrl-C, also of the impatient, reaches a whole group of processes; a kill only the one that started the others"
    child = start(MAP, os.path.dirname(__file__), tmp_path, start_new_session=True)
    try:
        assert until(lambda: len(list(tmp_path.iterdir())) > 3)
        for _ in range(times):
            (os.killpg if sent == signal.SIGINT else os.kill)(child.pid, sent)
            time.sleep(.002)
        printed = child.communicate(timeout=30)[1]
        assert until(lambda: not alive(child.pid), 20) and len(list(tmp_path.iterdir())) < 150
        if sent == signal.SIGINT:
            assert child.returncode not in (0, None) and 'KeyboardInterrupt' in printed and 'spawn_main' not in printed, printed
        assert not worker_folders(child.pid)
    finally:
        if alive(child.pid): os.killpg(child.pid, signal.SIGKILL)


def worker_folders(pid):
    import tempfile
    return list(Path(tempfile.gettempdir()).glob(f'strip-workers-{pid}-*'))


def test_what_is_left_when_all_are_killed_at_once_is_removed_by_the_next(tmp_path):
    child = start(MAP, os.path.dirname(__file__), tmp_path, start_new_session=True)
    assert until(lambda: len(list(tmp_path.iterdir())) > 3)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    assert until(lambda: not alive(child.pid), 20)
    remove_worker_files()
    assert not worker_folders(child.pid)


def test_a_script_without_a_main_part_is_told(tmp_path):
    (tmp_path/'script.py').write_text("from strip_notebooks.processes import parallel_map\nprint(list(parallel_map(abs, range(9), workers=2)))\n")
    done = subprocess.run([sys.executable, tmp_path/'script.py'], capture_output=True, text=True, timeout=60)
    assert done.returncode and "below `if __name__ == '__main__':`" in done.stderr.strip().splitlines()[-1]
    assert 'freeze_support' not in done.stderr                                # nor what the workers would say about it


def test_too_few_file_handles_or_processes_are_told():
    code = ("import resource; from strip_notebooks.processes import *; import pebble, joblib\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (len(__import__('os').listdir('/proc/self/fd')) + {}, 64))\n"
            "try: print(list(parallel_map(abs, [-1], workers=2)))\nexcept WorkerError as e: print('no worker', e)")
    for more in (1, 4, 8):
        done = subprocess.run([sys.executable, '-c', code.format(more)], capture_output=True, text=True, timeout=60, env=dict(os.environ, STRIP_PROGRESS='none'))
        assert done.returncode == 0 and ('file handles' in done.stdout or done.stdout.startswith('[1]')), (more, done)
        if more == 1: assert 'no worker' in done.stdout


def test_prints_of_workers_are_not_on_the_terminal(capfd):
    assert list(worker_results(print_and_end, [0, 1, 0], 2)) == [0, Died('crashed', 'from C'), 0]
    assert capfd.readouterr() == ('', '')


def print_and_end(item):
    os.write(2, b'from C')
    if item: os._exit(7)
    return item


def in_a_child(line):
    "In a process of multiprocessing: the results of workers, sent to the parent"
    line.send(list(parallel_map(abs, [-1, -2, -3], workers=2)))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
@pytest.mark.parametrize('before', [False, True])
def test_a_child_process_that_had_workers_ends(method, before):
    "Also one that was forked from a process with workers of its own"
    import multiprocessing
    if processes._crew: processes._crew.stop()      # a pool that starts a worker just now holds locks, and a fork would copy them
    if before: assert list(parallel_map(abs, [-5], workers=1)) == [5]
    context = multiprocessing.get_context(method)
    mine, its = context.Pipe()
    child = context.Process(target=in_a_child, args=(its,))
    child.start()
    try:
        assert mine.poll(100) and mine.recv() == [1, 2, 3]
        child.join(60)
        assert child.exitcode == 0
    finally: child.kill()


def test_a_worker_that_is_killed_while_it_starts_is_started_again():
    code = '''
import os, signal, threading, time
import psutil
from strip_notebooks.processes import parallel_map

def kill_the_first(n):
    me, seen = psutil.Process(), set()
    while len(seen) < n:
        for child in me.children():
            words = ' '.join(child.cmdline()) if child.is_running() else ''
            if 'spawn_main' not in words or child.pid in seen: continue
            seen.add(child.pid)
            child.send_signal(signal.SIGKILL)
        time.sleep(.005)

if __name__ == '__main__':
    threading.Thread(target=kill_the_first, args=(2,), daemon=True).start()
    print(list(parallel_map(abs, [-1, -2, -3], workers=1)))
'''
    process = start(code)
    out, err = process.communicate(timeout=120)
    assert out.strip() == '[1, 2, 3]' and process.returncode == 0, err
