"""A bot whose line breaks every five seconds: soak_bot.py [SECONDS], 600 by default, against the simulator.

In turn: closed with 1000, with 1001, reset, silence, 846609. Members write all the while, what the line lost and some
of the rest is delivered again under its msgid. Each message runs once and is answered once, by whatever road; only what
the log calls perhaps delivered may be missing. Between the first minute and the end the RSS may grow by 1 MB (a failure
at ten); threads and descriptors return to rest.
"""
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, os.pardir, os.pardir), os.path.join(HERE, os.pardir, os.pardir, 'examples')]

import simulator  # noqa: E402

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 600
RATE = 20
BOT = '''
import sys, time
sys.path.insert(0, %r)
import easywechat
easywechat.MemoryStore.max_entries = 1000       # else it is what grows
server = easywechat.WeChatServer('soak')
runs = open('runs', 'a', 1)

def pieces(text):
    for n in range(10):
        time.sleep(0.05)
        yield '%%d, ' %% n
    yield text

def push(text, user):
    while True:
        try:
            server.send(text, user)
            return None
        except easywechat.APIError as e:
            if getattr(e, 'maybe_sent', False):
                print('perhaps delivered', text, file=sys.stderr, flush=True)
                return None
            time.sleep(0.1)

@server.register_callback('text')
def answer(msg):
    text = msg['Content']
    runs.write(text.split()[1] + '\\n')
    if text.startswith('slow'):
        time.sleep(1.2)
    if text.startswith('push'):
        return push(text, msg['FromUserName'])
    if text.startswith('list'):
        return ['first part', text]
    return easywechat.Stream(pieces(text)) if text.startswith('stream') else text

vars(server.bot).update(pause=0.1, pause_most=0.5, ping_every=0.5, silent_within=1.5, ack_within=3, slow_after=0.4,
                        frame_every=0.1, per_minute=10 ** 9, per_hour=10 ** 9)
server.run()
''' % sys.path[0]


def figures(pid):
    with open('/proc/%d/status' % pid) as f:
        rss = int(re.search(r'VmRSS:\s+(\d+)', f.read()).group(1)) / 1024
    return rss, len(os.listdir('/proc/%d/task' % pid)), len(os.listdir('/proc/%d/fd' % pid))


class Members:
    """They write; `frames` is text → its first frame, `said` how often it was delivered."""
    def __init__(self, bot, folder):
        self.bot, self.frames, self.said = bot, {}, collections.Counter()
        self.answers, self._runs, self._serial = collections.Counter(), os.path.join(folder, 'runs'), 0
        self.runs, self._growing = collections.Counter(), []    # of a broken line some grow no more

    def say(self):
        self._serial += 1
        kind = random.choices(['fast', 'slow', 'stream', 'push', 'list'], [60, 8, 12, 12, 8])[0]
        text = '%s m%d;' % (kind, self._serial)
        with self.bot.corp._lock:
            frame = self.bot.say('u%d' % random.randrange(200), text)
            if frame:
                self.frames[text], self.said[text] = frame, 1

    def again(self, text):
        """The same message, delivered again as WeCom does."""
        with self.bot.corp._lock:
            if not self.bot.connected:
                return
            frame = dict(self.frames[text], headers={'req_id': self.bot.corp._next('req')})
            user = frame['body']['from']['userid']
            self.said[text] += 1
            self.bot._put(frame, json.dumps(frame), {
                'kind': 'message', 'chat': user, 'user': user, 'connection': self.bot.connected, 'at': self.bot.now(),
                'msgid': frame['body']['msgid'], 'streams': {}, 'card': None})

    def look(self):
        """Count what has been answered and run, forget it in the simulator."""
        with open(self._runs) as f:
            self.runs = collections.Counter(f.read().split())
        with self.bot.corp._lock:
            bubbles = self._growing + self.bot.bubbles
            self.bot.bubbles.clear()
            self._growing = [bubble for bubble in bubbles if not bubble['finished']]
            for bubble in bubbles:
                if bubble['finished']:
                    self.answers.update(re.findall('[a-z]+ m[0-9]+;', bubble['text']))

    def lost(self):
        """What never reached the callback."""
        return [text for text in list(self.frames) if text.split()[1] not in self.runs]


def break_line(bot, how):
    bot.heal()
    if not bot.connected:
        return
    if how == 846609:
        bot.fault('error', 846609)
    else:
        bot.fault('close', how) if isinstance(how, int) else bot.fault(how)


def write(members, stop):
    begin, n = time.monotonic(), 0
    while not stop.wait(max(0, begin + n / RATE - time.monotonic())):
        n += 1
        if members.bot.connected:
            members.say()


def main():
    wecom = simulator.WeCom()
    wecom.users.update(('u%d' % n, 'somebody') for n in range(200))
    wecom.start()
    bot = wecom.bot
    bot.per_minute = bot.per_hour = bot.subscribes = 10 ** 9
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower() and k != 'PYTHONDONTWRITEBYTECODE'}
    env.update(('EASYWECHAT_' + k.upper(), v) for k, v in wecom.bot_settings.items())
    with tempfile.TemporaryDirectory() as folder:
        log = open(os.path.join(folder, 'log'), 'w+', encoding='utf-8')
        process = subprocess.Popen([sys.executable, '-c', BOT], env=dict(env, XDG_CACHE_HOME=folder), stderr=log,
                                   cwd=folder)
        bot.wait(lambda bot: bot.connected, 10)
        time.sleep(1)
        rest, samples, members, stop = figures(process.pid), [], Members(bot, folder), threading.Event()
        writer = threading.Thread(target=write, args=(members, stop))
        writer.start()
        begin, ways, broken = time.monotonic(), [1000, 1001, 'abort', 'half_open', 846609], 0
        while time.monotonic() < begin + SECONDS:
            time.sleep(5)
            break_line(bot, ways[broken % len(ways)])
            broken += 1
            time.sleep(2.5 if broken % 5 == 4 else 0.7)
            members.look()
            recent = list(members.frames)[-8 * RATE:]
            for text in members.lost() + random.sample(recent, min(10, len(recent))):
                members.again(text)
            samples.append(figures(process.pid))
            if broken % max(1, int(SECONDS / 60)) == 0:
                print('%4.0f s: %d messages, RSS %.1f MB, %d threads, %d descriptors' % (
                    (time.monotonic() - begin, len(members.frames)) + samples[-1]), flush=True)
        stop.set()
        writer.join()
        bot.heal()
        for _ in range(5):
            bot.wait(lambda bot: bot.connected, 10)
            members.look()
            for text in members.lost():
                members.again(text)
            time.sleep(2)
        members.look()
        end = figures(process.pid)
        process.terminate()
        code = process.wait(10)
        wecom.stop()
        log.seek(0)
        told = log.read()
        log.close()
    perhaps = [text for text, frame in members.frames.items() if not members.answers[text]
               and re.search('perhaps delivered %s|message %s: .*may have been|message %s: .*消息可能已经到了' % (
                   text, frame['body']['msgid'], frame['body']['msgid']), told)]
    missing = [text for text in members.frames if not members.answers[text] and text not in perhaps]
    twice = [text for text, count in members.answers.items() if count > 1]
    runs = [text for text, count in members.runs.items() if count > 1]
    first = samples[min(len(samples) // 2, 10)]
    grown = samples[-1][0] - first[0]
    print('soak_bot: %d messages (%s), %d deliveries, the line broke %d times; %d not answered, %d perhaps, %d '
          'answered twice, %d run twice; RSS %+.2f MB; at rest %d threads, %d descriptors before, %d, %d after; exit '
          'code %d' % (
              len(members.frames), dict(collections.Counter(text.split()[0] for text in members.frames)),
              sum(members.said.values()), broken, len(missing), len(perhaps), len(twice), len(runs), grown, rest[1],
              rest[2], end[1], end[2], code))
    for name, texts in ('not answered', missing), ('twice', twice), ('run twice', runs):
        for text in texts[:5]:
            print('   %s: %s %s' % (name, text, members.frames.get(text, {}).get('body', {}).get('msgid')))
    for line in [line for line in told.splitlines() if 'internal error' in line or 'Traceback' in line][:5]:
        print('   ' + line)
    checks = [not missing, not twice, not runs, grown < 10, end[1] <= rest[1], end[2] <= rest[2] + 1, code == 0,
              'internal error' not in told and 'Traceback' not in told, len(perhaps) < len(members.frames) / 100]
    if 'KEEP' in os.environ:
        with open(os.environ['KEEP'], 'w', encoding='utf-8') as f:
            f.write(told)
    print('soak_bot: %d passed, %d failed' % (sum(checks), len(checks) - sum(checks)))
    return len(checks) - sum(checks)


if __name__ == '__main__':
    sys.exit(main())
