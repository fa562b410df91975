"""Real programs write mails, easywechat.py under the name sendmail takes them: mailx, mutt, smartmontools' 10mail.

Needs bsd-mailx, mutt and smartmontools. The WeCom is examples/simulator.py; what the receiver sees is compared.
"""
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, os.path.join(ROOT, 'examples'))

import simulator  # noqa: E402


def main():
    wecom = simulator.WeCom()
    url, passed, failed = wecom.start(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(os.path.join(folder, 'bin'))
        program = shutil.copy(os.path.join(ROOT, 'easywechat.py'), folder)
        os.chmod(program, 0o755)
        sendmail = os.path.join(folder, 'bin', 'sendmail')
        os.symlink(program, sendmail)
        with open(os.path.join(folder, 'config.ini'), 'w') as f:
            f.write('[demo]\n' + '\n'.join('%s = %s' % i for i in dict(wecom.settings, api_base=url).items()))
        os.chmod(f.name, 0o600)
        for name, text in (('mailrc', 'set sendmail=%s\n' % sendmail),
                           ('muttrc', 'set sendmail="%s -oem -oi"\n' % sendmail),
                           ('body', '磁盘 91%\n.\nthe end\n')):
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
                f.write(text)
        body, picture = os.path.join(folder, 'body'), os.path.join(ROOT, 'examples', 'simulator.png')
        env = dict(os.environ, MAILRC=os.path.join(folder, 'mailrc'), LC_ALL='C.UTF-8', HOME=folder,
                   PATH=os.path.dirname(sys.executable) + ':/usr/bin:/bin')
        mutt = ['mutt', '-F', os.path.join(folder, 'muttrc')]
        for command, wanted in (
                (['mail', '-s', '备份失败', 'root'], [('text', ['备份失败', '磁盘 91%', 'the end'])]),
                (['/etc/smartmontools/run.d/10mail', body, '-s', 'SMART error on host: nas', 'root'],
                 [('text', ['SMART error on host: nas', '磁盘 91%'])]),
                (mutt + ['-s', '日志 ⚠', '-a', picture, body, '--', 'root', 'lisi@nas'],
                 [('text', ['日志 ⚠', '磁盘 91%', 'the end']), ('image', []), ('file', [])])):
            with open(body, 'rb') as f:
                done = subprocess.run(command, stdin=f, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      timeout=60)
            sent, wecom.messages[:] = list(wecom.messages), []
            good = done.returncode == 0 and [m['msgtype'] for m in sent] == [kind for kind, _ in wanted] and all(
                word in m['text']['content'] for m, (_, words) in zip(sent, wanted) for word in words) and {
                m['touser'] for m in sent} == {'zhangsan'}
            passed, failed = passed + good, failed + (not good)
            if not good:
                print(command, done, sent)
    wecom.stop()
    print('mail: %d passed, %d failed' % (passed, failed))
    return failed


if __name__ == '__main__':
    sys.exit(main())
