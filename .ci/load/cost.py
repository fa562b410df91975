"""What sending costs: cost.py APPRISE, the command of that name. Everything against examples/simulator.py.

CPU and peak RSS of one --send beside apprise's of one notification, in one run, alternating, medians and ratios;
and what a 20 MB upload, and a mail with 20 MB attached, add to the peak. Fails beyond 2 and 4 MB, or ten times the
peer.
"""
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, os.pardir, os.pardir)


def run(args, env, folder, stdin=os.devnull):
    """→ (CPU seconds, peak RSS in MB) of one process."""
    with open(os.path.join(folder, stdin), 'rb') as f:
        process = subprocess.Popen(args, env=env, cwd=folder, stdin=f, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit('%s: status %d' % (args, status))
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    # A process of its own: a child's peak RSS begins at its parent's.
    wecom = subprocess.Popen([sys.executable, os.path.join(ROOT, 'examples', 'simulator.py')], stdout=subprocess.PIPE)
    next(wecom.stdout)
    settings = {}
    while 'robot' not in settings:
        key, _, value = next(wecom.stdout).decode().strip().partition(' = ')
        settings[key] = value
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, XDG_CACHE_HOME=folder, **{'EASYWECHAT_' + k.upper(): v for k, v in settings.items()})
        with open(os.path.join(folder, 'big.bin'), 'wb') as f:
            f.truncate(20 << 20)
        with open(os.path.join(folder, 'mail'), 'w') as f:
            f.write('Subject: x\nContent-Type: application/zip; name=a.zip\nContent-Transfer-Encoding: base64\n\n')
            f.writelines('A' * 76 + '\n' for _ in range((20 << 20) // 57))
        ours = [sys.executable, os.path.join(ROOT, 'easywechat.py'), '--send', '磁盘 91%']
        upload, mail = ours[:2] + ['--send-file', 'big.bin'], ours[:2] + ['--mail']
        url = settings['api_base'] + '/cgi-bin/webhook/send?key=' + settings['robot']
        peer = [sys.argv[1], '-b', '磁盘 91%', url.replace('http', 'json', 1) + '&:msgtype=text']
        figures = {'ours': [], 'apprise': [], 'upload': [], 'mail': []}
        for _ in range(7):
            figures['ours'].append(run(ours, env, folder))
            figures['apprise'].append(run(peer, env, folder))
            figures['upload'].append(run(upload, env, folder))
            figures['mail'].append(run(mail, env, folder, 'mail'))
    wecom.terminate()
    middle = {name: [statistics.median(c) for c in zip(*rows)] for name, rows in figures.items()}
    for name, (cpu, rss) in middle.items():
        print('%-8s CPU %4.0f ms (%.2f of apprise), peak RSS %.1f MB (%.2f)' % (
            name, cpu * 1000, cpu / middle['apprise'][0], rss, rss / middle['apprise'][1]))
    more, attached = (middle[name][1] - middle['ours'][1] for name in ('upload', 'mail'))
    print('20 MB upload: %+.1f MB, 20 MB attached to a mail: %+.1f MB' % (more, attached))
    bad = (more > 2) + (attached > 4) + (middle['ours'][0] > 10 * middle['apprise'][0])
    print('cost: %d passed, %d failed' % (3 - bad, bad))
    return bad


if __name__ == '__main__':
    sys.exit(main())
