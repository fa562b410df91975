"""kill -9 while the token is being written: kill.py COUNT. Nothing unusable may stay behind."""
import os
import random
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))

import easywechat  # noqa: E402

WRITER = '''
import sys
sys.path.insert(0, %r)
import easywechat
store = easywechat.FileStore(%r)
n = 0
while True:
    n += 1
    store.set('token', b'%%d' %% n * 500, ex=7200)
    if n == 1:
        print(flush=True)
'''


def main(count):
    unusable = leftovers = 0
    with tempfile.TemporaryDirectory() as folder:
        store = easywechat.FileStore(folder)
        for _ in range(count):
            writer = subprocess.Popen([sys.executable, '-S', '-c', WRITER % (sys.path[0], folder)],
                                      stdout=subprocess.PIPE)
            writer.stdout.readline()
            time.sleep(random.random() / 200)
            writer.kill()
            writer.wait()
            writer.stdout.close()
            value = store.get('token') or b''
            unusable += not value or value != value[:len(value) // 500] * 500
            leftovers = max(leftovers, len(os.listdir(folder)))
        for name in os.listdir(folder):
            os.utime(os.path.join(folder, name), (1, 1))
        store.set('other', b'x')
        left = [name for name in os.listdir(folder) if name.endswith('.tmp')]
    print('kill -9: %d times, %d unusable, at most %d files, %d temporary ones after the sweep'
          % (count, unusable, leftovers, len(left)))
    return 1 if unusable or left else 0


if __name__ == '__main__':
    sys.exit(main(int(sys.argv[1])))
