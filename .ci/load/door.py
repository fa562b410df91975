"""Who else on this machine does what to the local socket of a bot: door.py. What takes seconds; DoorTests has the rest.

Guests that say nothing, a flood of wrong proofs, a stopped bot, a squatter that says nothing, a bot and a sender of two
users (as root), a bot that dies while it is given a file. Printed: how long a sender took each time.
"""
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, os.pardir, os.pardir), os.path.join(HERE, os.pardir, os.pardir, 'examples')]

import easywechat  # noqa: E402
import simulator  # noqa: E402

BOT = '''
import easywechat
server = easywechat.WeChatServer('door')
server.register_callback('text', lambda msg: msg['Content'])
vars(server.bot).update(slow_pause=0.5, pause=0.1)
server.run()
'''
SENDER = '''
import pathlib, sys
import easywechat
server = easywechat.WeChatServer('door')
try:
    server.bot.send(pathlib.Path(sys.argv[2]) if sys.argv[1] == 'file' else sys.argv[2], 'zhangsan')
    print('sent')
except easywechat.APIError as e:
    print('maybe_sent' if getattr(e, 'maybe_sent', False) else 'not sent', e)
'''
NOBODY = 65534


class Machine:
    def __init__(self, folder):
        self.folder, self.wecom = folder, simulator.WeCom()
        self.wecom.start()
        shutil.copy(os.path.join(HERE, os.pardir, os.pardir, 'easywechat.py'), folder)
        self.bot = self.wecom.bot
        self.bot.met.add('zhangsan')
        self.bot.per_minute = self.bot.subscribes = 10 ** 9
        self.env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
        self.env.update(XDG_CACHE_HOME=folder, PYTHONDONTWRITEBYTECODE='1')
        self.env.update(('EASYWECHAT_' + k.upper(), v) for k, v in self.wecom.bot_settings.items())
        self.name = easywechat.WeChatServer('door', **self.wecom.bot_settings).bot

    def popen(self, code, *args, **more):
        user, python = more.pop('user', None), more.pop('python', sys.executable)
        return subprocess.Popen([python, '-c', code] + list(args), env=self.env, cwd=self.folder, preexec_fn=(
            lambda: (os.setgroups([]), os.setgid(user), os.setuid(user))) if user else None, **more)

    @contextlib.contextmanager
    def running(self, **more):
        """A bot → its process; what it wrote is in `told` afterwards."""
        with open(os.path.join(self.folder, 'log'), 'w+', encoding='utf-8') as log:
            process = self.popen(BOT, stderr=log, **more)
            try:
                self.bot.wait(lambda bot: bot.connected, 40)
                yield process
            finally:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                process.wait(10)
                log.seek(0)
                self.told = log.read()
        self.bot.wait(lambda bot: not bot.connected)

    def send(self, what, kind='text', **more):
        """→ (what the sender said, seconds, what arrived, subscriptions meanwhile)."""
        del self.bot.bubbles[:]
        before, begin = self.subscribed(), time.monotonic()
        process = self.popen(SENDER, kind, str(what), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **more)
        said = process.communicate(timeout=100)[0].decode().strip()
        return said, time.monotonic() - begin, [b['text'] for b in self.bot.bubbles], self.subscribed() - before

    def subscribed(self):
        return sum(f['frame'].get('cmd') == 'aibot_subscribe' for f in self.bot.frames)

    def knock(self):
        sock = easywechat._dial(self.name)
        sock.settimeout(30)
        return sock


def handed_over(result, text):
    assert result[0] == 'sent' and result[2] == [text] and not result[3], result
    return result[1]


def silent_guests(machine):
    with machine.running(), contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(contextlib.closing(machine.knock()))
        took = handed_over(machine.send('after them'), 'after them')
    assert took < 15, took
    return '8 guests that say nothing: a sender waits %.1f s' % took


def wrong_proofs(machine):
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            with contextlib.suppress(OSError, ValueError), contextlib.closing(machine.knock()) as sock:
                sock.sendall(b'{"nonce": "x", "proof": "%s"}\n' % (b'0' * 64))
                while sock.recv(1 << 16):
                    pass
            time.sleep(0.01)
    threads = [threading.Thread(target=flood) for _ in range(4)]
    with machine.running():
        for thread in threads:
            thread.start()
        time.sleep(3)
        try:
            took = handed_over(machine.send('through the flood'), 'through the flood')
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    lines = machine.told.count('wrong proof')
    assert took < 30 and lines < 15, (took, lines)
    return 'wrong proofs by four without a pause: a sender waits %.1f s, %d lines of log' % (took, lines)


def stopped(machine):
    with machine.running() as process:
        process.send_signal(signal.SIGSTOP)
        said, took, arrived, subscribed = machine.send('round it')
        assert (said, arrived, subscribed) == ('sent', ['round it'], 1), (said, arrived, subscribed)
        process.send_signal(signal.SIGCONT)
        machine.bot.wait(lambda bot: bot.connected, 20)
        machine.bot.say('zhangsan', 'alive')
        machine.bot.wait(lambda bot: bot.bubbles[-1]['text'] == 'alive')
    return 'a stopped bot: a sender goes its own way after %.1f s, the bot is back' % took


def silent_squatter(machine):
    squatter = easywechat._listen(machine.name)
    with contextlib.closing(squatter):
        begin = time.monotonic()
        with machine.running():
            took = time.monotonic() - begin
            said, own, arrived, subscribed = machine.send('past it')
    assert (said, arrived) == ('sent', ['past it']), (said, arrived)
    assert 'the local name is taken' in machine.told and took < 30, took
    return 'a squatter that says nothing: the bot connects after %.1f s, a sender after %.1f s' % (took, own)


def two_users(machine):
    path = pathlib.Path(machine.folder, 'root only.bin')
    path.write_bytes(b'secret of root')
    path.chmod(0o600)
    os.chmod(machine.folder, 0o755)
    theirs = {'user': NOBODY, 'python': '/usr/bin/python3'}         # ours may lie in root's home
    if os.getuid() or not os.path.exists(theirs['python']):
        return 'not root, or no /usr/bin/python3: two users were not tried'
    with machine.running(**theirs):
        took = handed_over(machine.send(path, 'file'), path.name)
        assert machine.wecom.media[machine.bot.bubbles[-1]['body']['media_id']]['data'] == b'secret of root'
    with machine.running():
        handed_over(machine.send('from nobody', **theirs), 'from nobody')
    return 'a bot of nobody sends a file that root alone reads (%.1f s), and the other way round' % took


def dying_host(machine):
    path = pathlib.Path(machine.folder, 'big.bin')
    path.write_bytes(bytes(20 << 20))
    machine.bot.fault('late_ack', 1, times=100, cmd='aibot_upload_media_chunk')
    with machine.running() as process:
        timer = threading.Timer(1.5, process.kill)
        timer.start()
        said, took, arrived, subscribed = machine.send(path, 'file')
        timer.join()
    machine.bot.heal()
    assert said.startswith('not sent') and not arrived and not subscribed, (said, arrived, subscribed)
    return 'a bot that is killed while it uploads: its sender says "not sent" after %.1f s' % took


def main():
    with tempfile.TemporaryDirectory() as folder:
        machine, failed = Machine(folder), 0
        trials = [silent_guests, wrong_proofs, stopped, silent_squatter, two_users, dying_host]
        for trial in trials:
            try:
                print(trial(machine), flush=True)
            except Exception as e:
                failed += 1
                print('FAILED: %s: %s: %s' % (trial.__name__, type(e).__name__, e), flush=True)
        machine.wecom.stop()
    print('door: %d passed, %d failed' % (len(trials) - failed, failed))
    return failed


if __name__ == '__main__':
    sys.exit(main())
