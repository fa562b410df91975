"""Two bots with one BotID, as on two machines, for five hours scaled to 18 s: duel.py [HOURS]. One hour is 3.6 s.

WeCom keeps the newest connection and tells the older one; whoever answers that by connecting at once duels for ever.
The second process ignores the local name, which would stop it on one machine. Printed: how often both subscribed (at
most 30 times in five hours), and that a bot that is left alone comes back and answers.
"""
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, os.pardir, 'examples'))

import simulator  # noqa: E402

HOURS = float(sys.argv[1]) if len(sys.argv) > 1 else 5
SCALE = 1000
BOT = '''
import sys
sys.path.insert(0, %r)
import easywechat
server = easywechat.WeChatServer('duel')
server.register_callback('text', lambda msg: '%%s: %%s' %% (sys.argv[1], msg['Content']))
for name in 'slow_pause', 'slow_pause_most', 'pause', 'pause_most', 'steady_after', 'ping_every', 'silent_within':
    setattr(server.bot, name, getattr(server.bot, name) / %d)
server.bot.ping_every = 5           # an idle line is not what is tried here
server.bot.silent_within = 12
if sys.argv[1] == 'second':
    start = server.bot._session.start
    server.bot._session.start = lambda door=True: start(False)
server.run()
''' % (os.path.join(HERE, os.pardir, os.pardir), SCALE)


def main():
    wecom = simulator.WeCom()
    wecom.start()
    wecom.bot.subscribes = 10 ** 9
    wecom.bot.per_minute = wecom.bot.per_hour = 10 ** 9
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
    env.update(('EASYWECHAT_' + k.upper(), v) for k, v in wecom.bot_settings.items())
    with tempfile.TemporaryDirectory() as folder:
        bots, logs = [], []
        for name in 'first', 'second':
            own = os.path.join(folder, name)
            os.mkdir(own)
            logs.append(open(os.path.join(own, 'log'), 'w+', encoding='utf-8'))
            bots.append(subprocess.Popen([sys.executable, '-c', BOT, name], cwd=own, stderr=logs[-1],
                                         env=dict(env, HOME=own, XDG_CACHE_HOME=own)))
            wecom.bot.wait(lambda bot: bot.connected, 10)
        begin, answered = time.monotonic(), 0
        while time.monotonic() < begin + HOURS * 3600 / SCALE:
            time.sleep(0.1)
            answered += wecom.bot.connected is not None
        subscribed = sum(f['frame'].get('cmd') == 'aibot_subscribe' for f in wecom.bot.frames)
        bots[1].terminate()
        bots[1].wait(10)
        left = time.monotonic()
        wecom.bot.wait(lambda bot: bot.connected, 10)       # an hour at most, 3.6 s
        back = time.monotonic() - left
        wecom.bot.say('zhangsan', '你好')
        wecom.bot.wait(lambda bot: bot.bubbles and bot.bubbles[-1]['text'] == 'first: 你好')
        bots[0].terminate()
        codes = [bot.wait(10) for bot in bots]
        wecom.stop()
        told = [log.seek(0) or sum('在别处连上了' in line for line in log) for log in logs]
        for log in logs:
            log.close()
    print('duel: %d subscribes of both in %g hours (30 are allowed), told %d + %d times, one of them connected %.0f %% '
          'of the time; left alone, back after %.0f minutes; exit codes %s' % (
              subscribed, HOURS, told[0], told[1], 100 * answered / (HOURS * 3600 / SCALE / 0.1),
              back * SCALE / 60, codes))
    bad = (subscribed > 30) + (codes != [0, 0])
    print('duel: %d passed, %d failed' % (3 - bad, bad))
    return bad


if __name__ == '__main__':
    sys.exit(main())
