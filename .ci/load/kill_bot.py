"""kill -9 of a bot in an upload or a stream, and of a sender that hands over to it: kill_bot.py [COUNT], 30 by default.

Every start after that works; what was answered is not answered again when its msgid comes again (the store is a
FileStore), nothing goes out twice or half, and the bot is as it was after its senders were killed.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, os.pardir, os.pardir), os.path.join(HERE, os.pardir, os.pardir, 'examples')]

import simulator  # noqa: E402

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 30
BOT = '''
import pathlib, sys, time
sys.path.insert(0, %r)
import easywechat
server = easywechat.WeChatServer('kill', store=easywechat.FileStore('store'))

@server.register_callback('text')
def answer(msg):
    with open('runs', 'a') as f:
        f.write(msg['MsgId'] + '\\n')
    def pieces():
        for n in range(40):
            time.sleep(0.01)
            yield 'piece %%d, ' %% n
    text = msg['Content']
    return pathlib.Path('20MB.bin') if text == 'upload' else easywechat.Stream(pieces()) if text == 'stream' else text

server.bot.frame_every, server.bot.slow_after = 0.03, 0.1
server.run()
''' % sys.path[0]
SENDER = '''
import pathlib, sys
sys.path.insert(0, %r)
import easywechat
print(flush=True)
print(easywechat.WeChatServer('kill').bot.send(pathlib.Path('20MB.bin'), 'lisi') is not None)
''' % sys.path[0]


def again(bot, frame, chat):
    """WeCom delivers the same message once more."""
    with bot.corp._lock:
        frame = dict(frame, headers={'req_id': bot.corp._next('req')})
        bot._put(frame, json.dumps(frame), {
            'kind': 'message', 'chat': chat, 'user': chat, 'connection': bot.connected, 'at': bot.now(),
            'msgid': frame['body']['msgid'], 'streams': {}, 'card': None})


class Trial:
    def __init__(self, folder):
        self.folder, self.problems = folder, []
        self.wecom = simulator.WeCom()
        self.wecom.start()
        self.bot = self.wecom.bot
        self.bot.per_minute = self.bot.per_hour = self.bot.subscribes = 10 ** 9
        self.env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
        self.env.update(XDG_CACHE_HOME=folder, TMPDIR=folder)
        self.env.update(('EASYWECHAT_' + k.upper(), v) for k, v in self.wecom.bot_settings.items())
        self.log = open(os.path.join(folder, 'log'), 'w')
        self.size = 20 << 20
        with open(os.path.join(folder, '20MB.bin'), 'wb') as f:
            f.write(os.urandom(1 << 20) * 20)

    def start(self, code=BOT, **more):
        return subprocess.Popen([sys.executable, '-c', code], cwd=self.folder, env=self.env, stderr=self.log, **more)

    def start_bot(self):
        begin = time.monotonic()
        process = self.start()
        self.bot.wait(lambda bot: bot.connected, 20)
        return process, time.monotonic() - begin

    def check(self, good, text):
        if not good:
            self.problems.append(text)

    def answers(self, frame):
        return [b for b in self.bot.bubbles if b['msgid'] == frame['body']['msgid'] and b['finished']]

    def runs(self, frame):
        with open(os.path.join(self.folder, 'runs')) as f:
            return f.read().split().count(frame['body']['msgid'])

    def answered(self, text):
        frame = self.bot.say('zhangsan', text)
        self.bot.wait(lambda bot: self.answers(frame), 20)

    def bots(self):
        """→ (how many of the killed had answered, longest start)."""
        done, longest = 0, 0
        for n in range(COUNT):
            process, took = self.start_bot()
            longest = max(longest, took)
            kind = 'stream' if n % 2 else 'upload'
            frame = self.bot.say('zhangsan', kind)
            time.sleep(random.random() * (0.6 if n % 2 else 1.6))
            process.kill()
            process.wait()
            self.bot.wait(lambda bot: not bot.connected)
            before = len(self.answers(frame))
            runs = self.runs(frame) if os.path.exists(os.path.join(self.folder, 'runs')) else 0
            done += before
            process, took = self.start_bot()
            longest = max(longest, took)
            again(self.bot, frame, 'zhangsan')
            self.answered('and now %d' % n)         # comes after it
            if before or not runs:
                time.sleep(0.7)
            if before:
                self.check(self.runs(frame) == runs, '%s ran again' % kind)
            self.check(len(self.answers(frame)) <= 1, '%s answered twice' % kind)
            process.terminate()
            self.check(process.wait(10) == 0, 'exit code after SIGTERM')
        return done, longest

    def senders(self):
        """→ (how many files arrived, threads and descriptors before, after)."""
        process, _ = self.start_bot()
        self.bot.met.add('lisi')
        self.answered('hello')          # the store opens a file of its own at the first
        time.sleep(3)
        rest = self.figures(process.pid)
        for n in range(COUNT):
            sender = self.start(SENDER, stdout=subprocess.PIPE)
            sender.stdout.readline()
            time.sleep(random.random() * 0.9)
            sender.kill()
            sender.wait()
            sender.stdout.close()
            self.answered('alive %d' % n)
        time.sleep(5)
        sender = self.start(SENDER, stdout=subprocess.PIPE)
        self.check(b'True' in sender.communicate(timeout=60)[0], 'the last sender failed')
        files = [b for b in self.bot.bubbles if b['chat'] == 'lisi']
        for bubble in files:
            self.check(len(self.wecom.media[bubble['body']['media_id']]['data']) == self.size, 'half a file')
        self.check(len(files) <= COUNT + 1, 'a file twice')
        time.sleep(3)
        end = self.figures(process.pid)
        self.check(end[0] <= rest[0] and end[1] <= rest[1], 'at rest %s, then %s' % (rest, end))
        process.terminate()
        self.check(process.wait(10) == 0, 'exit code after SIGTERM')
        return len(files), rest, end

    def figures(self, pid):
        return len(os.listdir('/proc/%d/task' % pid)), len(os.listdir('/proc/%d/fd' % pid))


def main():
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(folder)
        done, longest = trial.bots()
        print('kill -9 of the bot: %d times in an upload or a stream, %d had answered; longest start %.2f s' % (
            COUNT, done, longest), flush=True)
        arrived, rest, end = trial.senders()
        left = [name for name in os.listdir(folder) if name not in ('store', 'runs', '20MB.bin', 'log', 'easywechat')]
        trial.check(not left, 'left behind: %s' % left)
        print('kill -9 of a sender: %d times, %d files arrived, whole; %d threads, %d descriptors, then %d, %d' % (
            (COUNT, arrived) + rest + end))
        trial.check(not trial.bot.problems, trial.bot.problems)
        trial.wecom.stop()
        trial.log.close()
        for problem in trial.problems[:10]:
            print('  ', problem)
    print('kill_bot: %d problems' % len(trial.problems))
    return bool(trial.problems)


if __name__ == '__main__':
    sys.exit(main())
