"""The bot that cluster.py runs behind gunicorn.

STORE is a folder or redis:<socket>, RUNS the file where each run of the callback is a line. The message says how long
the callback takes (Seconds) and what it gives (Kind).
"""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402

if os.environ['STORE'].startswith('redis:'):
    import redis
    store = redis.Redis(unix_socket_path=os.environ['STORE'][6:], socket_timeout=1)
else:
    store = easywechat.FileStore(os.environ['STORE'])
server = easywechat.WeChatServer('bot', store=store)


@server.register_callback('*')
def callback(msg):
    with open(os.environ['RUNS'], 'a') as f:
        f.write('%s\n' % msg.get('Label', msg.get('MsgId')))
    seconds, kind = float(msg.get('Seconds', 0)), msg.get('Kind')
    if kind == 'five':
        return five(msg, seconds)
    time.sleep(seconds)
    return 'answer %s' % msg.get('Label', msg.get('MsgId'))


def five(msg, seconds):
    for n in range(5):
        time.sleep(seconds / 5)
        yield 'answer %s %d' % (msg['Label'], n)


print('ready', file=sys.stderr, flush=True)

if __name__ == '__main__':
    server.run('127.0.0.1', int(sys.argv[1]))
