#!/usr/bin/env python3
"""NAS 监控：磁盘、负载、温度、RAID (mdstat)、UPS（NUT 的 upsc）、SMART (smartctl)，读得到什么看什么。

    python examples/simulator.py examples/nas_monitor.py    # 没有账号也能试
    python examples/nas_monitor.py                          # 一直看着，并且回答「状态」；[--port 8000]
    python examples/nas_monitor.py --once                   # 看一遍就走，放在 cron 里
    python examples/nas_monitor.py --report                 # 现在就发一份日报

一件事报一次警，好了再说一次「恢复正常」，中间怎么摇摆都不说。断网时发不出去的存着，下次再发；记着这些的地方是
~/.local/state/easywechat（或在 $XDG_STATE_HOME 里），只有自己能写；没有这样的目录，就只在内存里。

发给 config.ini 里的 touser，也只回答他们。--once 和 --report 只要 touser，和 corpid、secret、agentid（应用）或
bot_id、bot_secret（智能机器人：经过在运行的那个发，没有就自己连一下），什么包都不装；
`* * * * * python3 …/nas_monitor.py --once` 就够了。smartctl 要 root。

config.ini 里可以写，都有默认值（在模拟器里要 `simulator.py --with nas`）：:

    [nas]
    disk = 90               # 磁盘用到百分之几报警；降到 disk_ok 才算恢复正常
    disk_ok = 85
    load = 2                # 平均每个核的 5 分钟负载
    load_ok = 1
    temperature = 80        # 最热的那个传感器，°C
    temperature_ok = 70
    interval = 60           # 隔多少秒看一遍
    report = 8              # 每天几点以后发日报，0 到 23；空着就不发
"""

import argparse
import contextlib
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

# 在自己的项目里，easywechat.py 就放在程序旁边，不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402

logger = easywechat.logger

#: /proc、/sys 和程序在哪里；测试换成自己的目录。
ROOT = '/'
#: cron 的 PATH 里没有的目录，smartctl 常在其中。
PROGRAMS = 'usr/sbin', 'sbin', 'usr/local/sbin', 'usr/local/bin', 'opt/sbin', 'opt/bin'
#: 一个程序最多跑多少秒。
PATIENCE = 10

DEFAULTS = {'disk': 90, 'disk_ok': 85, 'load': 2, 'load_ok': 1, 'temperature': 80, 'temperature_ok': 70,
            'interval': 60, 'report': 8}
#: 发警报要的键。
NEEDS = 'corpid', 'secret', 'agentid', 'touser'


# ---- 配置 -------------------------------------------------------------------------------------

#: 键 →（怎样写，一句话）；别的键是一个数。
FORMS = {'report': ('([01]?[0-9]|2[0-3])?', '写 0 到 23 的一个钟点，空着就不发日报'),
         'interval': ('[1-9][0-9]{0,5}', '写隔多少秒，1 以上')}


def thresholds():
    """``[nas]`` 一节 (dict)，没写的是默认值，``report`` 是 None 就没有日报；写错了的抛 `ConfigError`。"""
    settings, where = dict(DEFAULTS), 'config.ini 的 [nas] 里'
    for name, text in easywechat.get_section('nas').items():
        if name not in DEFAULTS:
            raise easywechat.ConfigError('%s没有 %.40r 这个键，有的是：%s' % (where, name, '、'.join(DEFAULTS)))
        form, words = FORMS.get(name, (r'[0-9]{1,5}(\.[0-9]+)?', '写一个数，不带单位'))
        if not re.fullmatch(form, text):
            raise easywechat.ConfigError('%s %s 不能是 %.40r：%s' % (where, name, text, words))
        settings[name] = float(text) if text else None
    for name in 'disk', 'load', 'temperature':
        if settings[name + '_ok'] >= settings[name]:
            raise easywechat.ConfigError('%s %s_ok 要比 %s 小' % (where, name, name))
    return settings


# ---- 看一遍 -----------------------------------------------------------------------------------
# 每个 find_… 是一个生成器，给出（名字，一句话，坏不坏）：True 坏，False 好，
# None 说不准（在两个阈值之间，或没有读到），原来怎样就还怎样。

def read(path):
    """一个小文件的内容 (str)；没有就是空的。"""
    try:
        with open(os.path.join(ROOT, path), encoding='utf-8', errors='surrogateescape') as f:
            return f.read()
    except OSError:
        return ''


def output_of(program, *arguments):
    """跑一个程序 →（退出码，输出）；没有装、超时是 (None, '')。"""
    path = os.pathsep.join([os.environ.get('PATH', '')] + [os.path.join(ROOT, p) for p in PROGRAMS])
    command = shutil.which(program, path=path)
    if command:
        try:
            done = subprocess.run((command,) + arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, timeout=PATIENCE)
            return done.returncode, done.stdout.decode('utf-8', 'replace')
        except (OSError, subprocess.TimeoutExpired) as e:
            logger.warning('%s: %s', program, e)
    return None, ''


def level(settings, name, value):
    """坏不坏：到了阈值 ``name`` 是坏，降到 ``name_ok`` 是好。"""
    return True if value >= settings[name] else False if value <= settings[name + '_ok'] else None


def find_disks(settings):
    """真的磁盘：/dev/… 和 zfs，一个设备（一个 zfs 的池）一次。"""
    seen = set()
    for line in read('proc/mounts').splitlines():
        device, mount, kind = line.split()[:3]
        device = device.partition('/')[0] if kind == 'zfs' else device
        if device in seen or kind in ('squashfs', 'erofs', 'iso9660', 'udf') or not (
                kind == 'zfs' or device.startswith('/dev/')):
            continue
        seen.add(device)
        mount = re.sub(r'\\([0-7]{3})', lambda m: chr(int(m.group(1), 8)), mount)
        path = os.path.join(ROOT, mount.lstrip('/')).encode('utf-8', 'surrogateescape')
        with contextlib.suppress(OSError, ZeroDivisionError):
            usage = shutil.disk_usage(path)
            percent = 100 * usage.used / (usage.used + usage.free)
            yield ('磁盘 ' + mount, '用了 %.0f%%，还有 %.1f GB' % (percent, usage.free / 1e9),
                   level(settings, 'disk', percent))


def find_load(settings):
    """5 分钟的平均，按核。"""
    for text in read('proc/loadavg').split()[1:2]:
        load = float(text) / (os.cpu_count() or 1)
        yield '负载', '每核 %.2f' % load, level(settings, 'load', load)


def find_memory(settings):
    """开机多久，还有多少内存：只说，不报警。"""
    for seconds in read('proc/uptime').split()[:1]:
        minutes = int(float(seconds)) // 60
        yield '开机', '%d 天 %d 小时 %d 分' % (minutes // 1440, minutes // 60 % 24, minutes % 60), None
    memory = dict(re.findall(r'(?m)^(Mem\w+): *(\d+) kB', read('proc/meminfo')))
    if 'MemAvailable' in memory:
        yield '内存', '可用 %d MB，共 %d MB' % (int(memory['MemAvailable']) >> 10, int(memory['MemTotal']) >> 10), None


def find_temperature(settings):
    """最热的那个传感器；不像样的读数不算。"""
    sensors = []
    for path in glob.glob(os.path.join(ROOT, 'sys/class/thermal/thermal_zone*/temp')) + glob.glob(
            os.path.join(ROOT, 'sys/class/hwmon/hwmon*/temp*_input')):
        folder, text = os.path.dirname(path), read(path).strip()
        if re.fullmatch('[0-9]{4,6}', text) and int(text) < 150000:
            name = read(os.path.join(folder, 'type')) or read(os.path.join(folder, 'name'))
            sensors.append((int(text) / 1000, name.strip()))
    if sensors:
        degrees, name = max(sensors)
        yield '温度', '%.0f °C' % degrees + (name and '（%s）' % name), level(settings, 'temperature', degrees)


#: /proc/mdstat 里在做的事。
RAID_WORK = {'recovery': '重建', 'resync': '同步', 'reshape': '扩容', 'check': '检查', 'repair': '修复'}


def find_raid(settings):
    """/proc/mdstat：停了的、有盘坏了 (F)、缺了盘 `_` 的是坏；在重建的，说到哪里了。

    有的 NAS 把系统盘的阵列建在所有槽位上，空的槽位一直是 `_`：它的盘在别的阵列里都是全的，就不算缺。
    """
    arrays = []
    for block in re.findall(r'^md\S* : .*(?:\n .*)*', read('proc/mdstat'), re.M):
        good = re.findall(r'(\w+)\[\d+\](?!\(F\))', block)          # 分区；去掉后面的号，就是盘
        disks = {re.sub(r'(?<=\d)p\d+$|(?<=[a-z])\d+$', '', part) for part in good}
        arrays.append((block, (re.findall(r'\[[U_]+\]', block) or [''])[0], disks))
    whole = set().union(*(disks for block, slots, disks in arrays if set(slots) == set('[U]') and '(F)' not in block))
    for block, slots, disks in arrays:
        stopped = ' : inactive' in block
        bad = stopped or '(F)' in block or '_' in slots and not disks <= whole
        words = ['停了' if stopped else '降级' if bad else '正常', slots]
        words += [RAID_WORK.get(what, what) + ' ' + percent for what, percent in re.findall(
            r'(\w+) *= *([0-9.]+%)', block)]
        yield 'RAID ' + block.split()[0], ' '.join(filter(None, words)), bad


#: ups.status 里不好的几种：（标志，说的是什么，坏的时候，好的时候）。
UPS_FLAGS = (('OB', '市电', '停了', '有'), ('LB', '电量', '快没了', '够'), ('RB', '电池', '要换', '好'))


def find_ups(settings):
    """NUT 管着的每一个。"""
    for ups in output_of('upsc', '-l')[1].split():
        values = dict(re.findall(r'^(\S+): (.*)$', output_of('upsc', ups)[1], re.M))
        flags = values.get('ups.status', '').split()
        charge = '，电池 %s%%' % values['battery.charge'] if 'battery.charge' in values else ''
        for flag, what, bad, good in UPS_FLAGS:
            text = (bad if flag in flags else good) + charge if flags else '没读到'
            yield 'UPS %s %s' % (ups, what), text, flag in flags if flags else None


def find_smart(settings):
    """每个硬盘自己说它好不好；睡着的不叫醒。"""
    for path in sorted(glob.glob(os.path.join(ROOT, 'sys/block/*'))):
        disk = os.path.basename(path)
        if re.fullmatch('[sh]d[a-z]+|nvme[0-9]+n[0-9]+', disk):
            code, text = output_of('smartctl', '-n', 'standby', '-H', '/dev/' + disk)
            if code is None:
                continue
            bad = False if re.search('PASSED|: OK', text) else None     # None：没有权限，或盘睡着
            if code > 0 and code & 8:           # 3 号位是「要坏了」；负的是 smartctl 被杀了
                bad = True
            yield 'SMART ' + disk, {True: '要坏了，快换', False: '正常', None: '没读到'}[bad], bad


def look(settings, smart=True):
    """所有的（名字，一句话，坏不坏）；``smart`` 为假时没有 SMART。"""
    finders = [find_memory, find_load, find_disks, find_temperature, find_raid, find_ups] + [find_smart] * smart
    return [finding for find in finders for finding in find(settings)]


def report(alerts=(), settings=DEFAULTS):
    """这台机器的状态：开机多久，负载、内存、磁盘、温度、RAID、UPS、SMART。不好的、在 ``alerts`` 里的前面有 ⚠。"""
    lines = ['%s%s：%s' % ('⚠ ' if bad or name in alerts else '', name, text) for name, text, bad in look(settings)]
    return easywechat.plain_text('\n'.join([platform.node() + ' 的状态'] + lines))


# ---- 记着的 -----------------------------------------------------------------------------------
# state：{'alerts': [报过警还没恢复的名字], 'unsent': [还没发出去的], 'reported': 最近一次日报的日期，
# 'smart': 最近一次看 SMART 的钟点}。变了才写：不为它叫醒睡着的硬盘。没有地方放，就只在内存里。

NAME = 'nas_monitor'


def kept():
    """记事情的存储：别人改不了，也换不成符号链接；没有地方抛 `OSError`。"""
    return easywechat.FileStore(easywechat.state_folder())


def load():
    """上一次的 state；没有，或者坏了，是新的。"""
    state = {'alerts': [], 'unsent': [], 'reported': '', 'smart': None}
    try:
        state.update(json.loads((kept().get(NAME) or b'{}').decode('utf-8')))
    except OSError as e:
        logger.debug('no state: %s', e)
    except (ValueError, TypeError) as e:
        logger.error('the state is damaged：从头开始记（%s）', e)
    return state


def save(state):
    """存下 → 成了没有；写不了（磁盘满了正要报警）就只在内存里。"""
    try:
        store = kept()
    except OSError:
        return False            # `alone` 说过了
    try:
        return bool(store.set(NAME, json.dumps(state).encode('ascii')))
    except OSError as e:
        logger.error('cannot save the state：%s；看磁盘满了没有', e)
        return False


@contextlib.contextmanager
def alone():
    """同时只有一个在看，已经有了抛 `ConfigError`；没有地方放 state，就不管有几个，只说一声。"""
    try:
        lock = kept().lock(NAME, 0, NAME)
    except OSError as e:
        logger.warning('cannot keep the state：只在内存里（%s）；用环境变量 XDG_STATE_HOME 指定一个能写的目录', e)
        lock = contextlib.ExitStack()
    with lock as mine:
        if not mine:
            raise easywechat.ConfigError('已经有一个在看着：不用再开一个；要换掉它，先停掉那一个')
        yield


# ---- 报警 -------------------------------------------------------------------------------------

def changes(state, findings, now):
    """新坏了的、刚好了的，各一条消息 (list)；记进 ``state``。"""
    messages = []
    stamp = '%s %s' % (platform.node(), time.strftime('%m-%d %H:%M:%S', time.localtime(now)))
    for name, text, bad in findings:
        if bad and name not in state['alerts']:
            state['alerts'].append(name)
            messages.append(easywechat.plain_text('⚠ %s：%s\n%s' % (name, text, stamp)))
        elif bad is False and name in state['alerts']:
            state['alerts'].remove(name)
            messages.append(easywechat.plain_text('恢复正常：%s，%s\n%s' % (name, text, stamp)))
    return messages


def deliver(client, state):
    """发 ``unsent`` 里的，依次；连不上就留着，下次再发。

    没有得到回答的也许已经到了：应用再发的一字不差，企业微信四个小时之内的重复不会再给用户看；智能机器人没有这个，不再发。
    """
    app = isinstance(easywechat.get_sender(client.settings), easywechat.WeChatClient)
    twice = {'enable_duplicate_check': 1, 'duplicate_check_interval': 14400} if app else {}
    for text in list(state['unsent']):
        try:
            client.send(text, **twice)
        except easywechat.APIError as e:
            maybe = getattr(e, 'maybe_sent', False) and not app
            logger.error('%s: %s', 'perhaps sent' if maybe else 'not sent, kept for the next time', e)
            if isinstance(e, easywechat.NetworkError) and not maybe:
                return
            if not maybe:
                continue
        state['unsent'].remove(text)
        save(state)


def is_due(state, settings, now):
    """今天的日报该发了。时钟往回跳过了零点不算新的一天，没有校过的时钟也不算。"""
    today, tomorrow = (time.strftime('%Y-%m-%d', time.localtime(now + day)) for day in (0, 86400))
    return (settings['report'] is not None and time.localtime(now).tm_hour >= settings['report']
            and today > '2026' and not today <= state['reported'] <= tomorrow)


def check(client, state, settings, now):
    """看一遍，有变化就发。"""
    hour = now // 3600
    smart = hour != state['smart']      # 一小时一次：有的盘每问一次，就重新算多久以后休眠
    messages = changes(state, look(settings, smart), now)
    if messages or smart:
        state['unsent'] += messages
        state['smart'] = hour
        save(state)                     # 先存后发：在这中间断电，来电以后再发
    deliver(client, state)
    if is_due(state, settings, now):
        try:
            client.send(report(state['alerts'], settings))
        except easywechat.APIError as e:
            logger.error('no report: %s', e)
            if not getattr(e, 'maybe_sent', False):
                return          # 下一遍再试
        state['reported'] = time.strftime('%Y-%m-%d', time.localtime(now))
        save(state)


# ---- 机器人 -----------------------------------------------------------------------------------

def register(server, state, settings):
    """把回调登记到 ``server``。"""
    server.register_callback('text', lambda msg: '可以说：状态')
    server.register_callback('text', lambda msg: report(state['alerts'], settings), pattern=r'\W*状态\W*')


def watch(client, state, settings, stop):
    """隔一会儿看一遍，直到 ``stop`` (Event)。"""
    while True:
        try:
            check(client, state, settings, time.time())
        except Exception:       # 看门的不能因为一次意外就再也不看了
            logger.exception('a check failed')
        if stop.wait(settings['interval']):
            return


def serve(settings, port):
    """机器人在这条线程上，看门的在另一条。"""
    state, stop = load(), threading.Event()
    server = easywechat.WeChatServer('demo', needs=NEEDS, only_touser=True)
    register(server, state, settings)
    watcher = threading.Thread(target=watch, daemon=True, args=(server, state, settings, stop))
    watcher.start()
    try:
        server.run(port=port)
    finally:
        stop.set()
        watcher.join(5)


def main(argv=None):
    parser = argparse.ArgumentParser(description='NAS 监控：报警、日报、回答「状态」。')
    parser.add_argument('--once', action='store_true', help='看一遍就走 (cron)')
    parser.add_argument('--report', action='store_true', help='现在就发一份日报')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    args, settings = parser.parse_args(argv), thresholds()
    sender = easywechat.get_sender(easywechat.get_config('demo', needs=NEEDS))
    if args.report:
        sender.send(report(load()['alerts'], settings))
        return 0
    with alone():
        if not args.once:
            return serve(settings, args.port)
        state, now = load(), time.time()
        if is_due(state, settings, now) and not save(state):
            settings['report'] = None       # 记不住今天的发过了，就会每一遍都发
        check(sender, state, settings, now)
        return 3 if state['unsent'] else 0


if __name__ == '__main__':
    easywechat.command(main)
