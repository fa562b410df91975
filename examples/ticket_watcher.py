#!/usr/bin/env python3
"""12306 余票监控：有票了就发消息。只看余票，不登录，不下单。

    python examples/simulator.py examples/ticket_watcher.py # 没有账号也能试
    python examples/ticket_watcher.py                       # 用自己的 config.ini，应用还要写 secret 和 agentid

对它说「监控 北京 上海 12-31」，后面可以有车次和席别；「列表」；「取消 2」。站名就是城市名的，同城的站都看。
在看哪些记在 ~/.local/state/easywechat（或在 $XDG_STATE_HOME 里），只有自己能写；重启以后接着看。

12306 没有公开的接口：这里用的是它的网页自己查余票的那个，没有文档，随时会变。所以问得慢（`Railway.pause`、
`Watcher.every`），被拒绝就越等越久，不用来抢票。用到的：

    /otn/leftTicket/init
        会话的 cookie，和余票的路径：var CLeftTicketUrl = 'leftTicket/queryX'
    /otn/resources/js/framework/station_name.js
        @bjb|北京北|VAP|beijingbei|bjb|0|0357|北京|||@…，从 0 数起：1 站名，2 电报码，7 城市
    /otn/leftTicket/queryX?leftTicketDTO.train_date=…
        {"data": {"result": ["…|…", …], "map": {"VNP": "北京南"}}}
        或 {"c_url": "leftTicket/queryY"}：路径换了
        result 的每一行：3 车次，6、7 上下车的站，8、9 时刻，11 能不能买 (Y)，20–33 座位 (`SEATS`)
"""

import argparse
import collections
import contextlib
import datetime
import difflib
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import zlib

# 在自己的项目里，easywechat.py 就放在程序旁边，不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402

BASE = 'https://kyfw.12306.cn'
CHINA = datetime.timezone(datetime.timedelta(hours=8))
#: 监控存在这个名字下。
NAME = 'ticket_watcher'
#: 今天算在内，卖几天以内的票；每个人最多监控几个。
PRESALE, MOST = 15, 10
#: 席别 → 一行里的第几列。
SEATS = {'商务座': 32, '优选一等座': 20, '特等座': 25, '一等座': 31, '二等座': 30, '高级软卧': 21,
         '动卧': 33, '软卧': 23, '硬卧': 28, '软座': 24, '硬座': 29, '无座': 26}
HELP = '''监控 北京 上海 12-31：有票了告诉你；日期也可以写明天、周五、31号、2026-12-31
监控 北京到上海 12月31日 G D31 二等座：只看这些车次、席别
列表：在看哪些
取消 2：不看列表里的第二个；只写「取消」是全部'''

#: 全角的 → 半角的：字母、数字、标点；「的」当作空格。
FOLD = {n: n - 0xfee0 for n in range(0xff01, 0xff5f)}
FOLD.update({0x3001: ',', 0x3002: '.', ord('的'): ' '})
#: 一句话里的日期，半角的。
DAY = re.compile(
    '(?<![0-9A-Za-z])(?:(?:([0-9]{4})[-/.年])?([0-9]{1,2})[-/.月]([0-9]{1,2})[日号]?'   # 2026-12-31、12/31、12月31号
    '|([0-9]{8})|([0-9]{1,2})[日号])(?![-/.]?[0-9])'                                   # 20261231、31号
    r'|(今天|明天|后天|大后天)|(下*|这|本)(?:周|星期|礼拜)([一二三四五六日天])')        # 周五、下周五
#: 车次还可以这样说。
KINDS = {'高铁': 'G', '动车': 'D', '城际': 'C'}

logger = easywechat.logger

Train = collections.namedtuple('Train', 'code start end departs arrives seats')


# ---- 12306 ------------------------------------------------------------------------------------

class Refused(Exception):
    """12306 没有照预想的回答。"""


def parse_stations(text):
    """station_name.js → {站名：（电报码，城市）}。"""
    rows = [row.split('|') for row in text.split('@')[1:]]
    return {row[1]: (row[2], row[7] if len(row) > 7 else row[1]) for row in rows if len(row) > 5}


def parse_train(row, names):
    """余票的一行 → `Train`；``seats`` 是有票的 {席别：'有' 或张数}。看不懂的是 None。"""
    cells = row.split('|') if isinstance(row, str) else []
    if len(cells) <= max(SEATS.values()):
        return None
    seats = {name: cells[n] for name, n in SEATS.items()
             if cells[11] == 'Y' and re.fullmatch('有|[1-9][0-9]*', cells[n])}
    start, end = ((code, str(names.get(code, code))) for code in cells[6:8])
    return Train(cells[3], start, end, cells[8], cells[9], seats)


class Railway:
    """和 12306 的会话：一次一个请求，慢慢来。"""

    #: 两次请求之间至少几秒，不管有多少个监控；再随机多等至多一半。
    pause = 10
    #: 被拒绝一次等 ``pause`` 的 2 倍，再一次 4 倍 … 最多这么多秒。
    longest = 3600
    #: 一个请求一共等多少秒；一个回答最多多少字节，解压以后也是。
    timeout, most = 15, 4 << 20

    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(self, base=BASE):
        self.base = base.rstrip('/')
        self.stations = {}
        self.not_before = 0         # 什么时候可以再请求
        self.failures, self.trouble = 0, ''     # 连着被拒绝了几次，最近一次为什么
        self._forget()

    def _forget(self):
        """下次从头来：新的 cookie，新的路径。"""
        self._path, self._cookies = None, {}

    def _wait(self, seconds):
        self.not_before = self._now() + seconds * random.uniform(1, 1.5)

    def _get(self, path, query=()):
        """一个请求 → 正文 (str)。"""
        self._sleep(max(0, self.not_before - self._now()))
        url = '%s/otn/%s?%s' % (self.base, path, urllib.parse.urlencode(query))
        headers = {'User-Agent': 'Mozilla/5.0', 'Accept-Encoding': 'gzip', 'Cache-Control': 'no-cache',
                   'Referer': self.base + '/otn/leftTicket/init'}
        if self._cookies:
            headers['Cookie'] = '; '.join('%s=%s' % item for item in self._cookies.items())
        try:
            with easywechat.fetch(url.rstrip('?'), None, headers, self.timeout) as answer:
                if answer.status != 200:        # 12306 用转到错误页面来拒绝
                    raise Refused('%s 返回 HTTP %d' % (path, answer.status))
                for cookie in answer.headers.get_all('Set-Cookie', ()):
                    name, _, value = cookie.partition(';')[0].partition('=')
                    self._cookies[name.strip()] = value.strip()
                data = answer.read(self.most)
                if answer.headers.get('Content-Encoding') == 'gzip':
                    data = zlib.decompressobj(31).decompress(data, self.most + 1)
        except easywechat.NetworkError as e:
            raise Refused(e.hint) from None
        except zlib.error as e:
            raise Refused('%s 的回答读不懂（%s）' % (path, e)) from None
        finally:
            self._wait(self.pause)
        if len(data) > self.most:
            raise Refused('%s 的回答超过 %d 字节' % (path, self.most))
        return data.decode('utf-8', 'replace')

    def _follow(self, path):
        if not re.fullmatch('leftTicket/query[A-Za-z0-9]*', str(path)):
            raise Refused('不认得的余票路径 %.100r' % (path,))
        self._path = path

    def _query(self, date, start, end):
        """这一天从 ``start`` 到 ``end``（电报码）的车 → [`Train`]。"""
        if not self._path:
            page = self._get('leftTicket/init')
            self._follow((re.findall(r"CLeftTicketUrl\s*=\s*'([^']*)'", page) or [None])[0])
        for _ in range(2):          # 路径换了，就再问一次
            text = self._get(self._path, [      # 网页的顺序
                ('leftTicketDTO.train_date', date), ('leftTicketDTO.from_station', start),
                ('leftTicketDTO.to_station', end), ('purpose_codes', 'ADULT')])
            try:
                answer = easywechat.json_to_dict(text.encode('utf-8'))
                if not answer.get('c_url'):
                    rows, names = answer['data']['result'], answer['data'].get('map') or {}
                    return [train for train in (parse_train(row, names) for row in rows) if train]
                self._follow(answer['c_url'])
            except (ValueError, AttributeError, LookupError, TypeError):
                raise Refused('不像余票的回答 %.100r' % text) from None
        raise Refused('余票的路径一直在换')

    def _load(self):
        """取车站表。"""
        self.stations = parse_stations(self._get('resources/js/framework/station_name.js'))
        if not self.stations:
            raise Refused('车站表是空的')

    def ask(self, *route):
        """`_query` 一条路线，没有就 `_load`；不成抛 `Refused`，下次越等越久。"""
        try:
            result = self._query(*route) if route else self._load()
        except Refused as e:
            self.failures, self.trouble = self.failures + 1, str(e)
            self._forget()
            self._wait(min(self.pause * 2 ** min(self.failures, 20), self.longest))
            logger.warning('12306 refused %d times, the next request in %.0f s: %s',
                           self.failures, self.not_before - self._now(), e)
            raise
        self.failures = 0
        return result


# ---- 监控 --------------------------------------------------------------------------------------
# 一个监控是一个 dict：user；start、end（站名），codes（电报码），exact（上下车是不是就要这个站），date；trains、seats
#（只看这些，空的是都看）；seen（上次有票的 [车次，席别]），note（上次看到什么，不存）。

def find_station(stations, name):
    """→（站名，电报码，是不是就要这个站）；没有抛 `ValueError`，带着像的。"""
    name = name if name in stations else name.rstrip('站')
    if name not in stations:
        close = [n for n in stations if name in n][:5] if name else []
        close = close or difflib.get_close_matches(name, stations, 5, 0.5)
        raise ValueError('没有「%s」这个车站%s' % (name, '，有：' + '、'.join(close) if close else ''))
    code, city = stations[name]
    return name, code, city != name


def day_of(match, today):
    """`DAY` 的匹配 → date；没有写年、月的，是今天以后最近的。没有这一天、过了的抛 `ValueError`。"""
    year, month, day, whole, only, word, weeks, weekday = match.groups()
    dates = []
    if word:
        dates.append(today + datetime.timedelta(('今天', '明天', '后天', '大后天').index(word)))
    elif weekday:
        date = today + datetime.timedelta('一二三四五六日'.index(weekday.replace('天', '日')) - today.weekday())
        dates += [date + datetime.timedelta(7 * n) for n in ([weeks.count('下')] if weeks else [0, 1])]
    elif whole:
        year, month, day = whole[:4], whole[4:6], whole[6:]
    for y in () if dates else [year] if year else [today.year, today.year + 1]:
        for m in [month] if month else range(1, 13):
            with contextlib.suppress(ValueError):
                dates.append(datetime.date(int(y), int(m), int(day or only)))
    if not dates or dates[-1] < today:
        raise ValueError('%s 已经过了' % dates[-1] if dates else '没有「%s」这一天' % match.group())
    return min(date for date in dates if date >= today)


def parse_watch(text, stations, today):
    """「监控」后面的话，半角的 → 监控；不对的抛 `ValueError`，是给用户的一句话。"""
    days = {day_of(match, today) for match in DAY.finditer(text)}
    places, watch = [], {'trains': [], 'seats': [], 'seen': []}
    for word in re.findall(r'[0-9A-Za-z:]+次?|[^-0-9A-Za-z\s,;.>~\u2013\u2014\u2192]+', DAY.sub(' ', text)):
        train = KINDS.get(word, word.rstrip('次'))
        if re.fullmatch('[A-Za-z][0-9]{0,4}|[0-9]{4}', train):
            watch['trains'].append(train.upper())
        elif word in SEATS or word + '座' in SEATS:
            watch['seats'].append(word if word in SEATS else word + '座')
        else:
            places += [word] if word.rstrip('站') in stations else filter(None, re.split('[从到至]', word))
    if len(places) > 2:
        raise ValueError('看不懂「%s」：车次写 G 或 G1，席别有%s' % (places[2], '、'.join(SEATS)))
    if len(places) < 2 or len(days) != 1:
        raise ValueError('要两个车站、一个日期，写成：监控 北京 上海 12-31，后面可以有车次和席别')
    ends = [find_station(stations, name) for name in places]
    if ends[0] == ends[1]:
        raise ValueError('出发和到达是同一个车站')
    names, codes, exact = map(list, zip(*ends))
    return dict(watch, start=names[0], end=names[1], codes=codes, exact=exact, date=str(days.pop()))


def sale_begins(watch):
    date = datetime.datetime.strptime(watch['date'], '%Y-%m-%d').date()
    return date - datetime.timedelta(PRESALE - 1)


def route_of(watch):
    return (watch['date'],) + tuple(watch['codes'])


def describe(watch):
    return ' '.join(['%s → %s' % (watch['start'], watch['end']), watch['date']]
                    + watch['trains'] + watch['seats'])


def wanted(watch, trains):
    """这个监控要的车，只留要的席别（生成器）。"""
    for train in trains:
        ends = zip(watch['exact'], watch['codes'], (train.start[0], train.end[0]))
        if all(code == place or not exact for exact, code, place in ends) and (not watch['trains'] or any(
                train.code == t or t.isalpha() and train.code.startswith(t) for t in watch['trains'])):
            yield train._replace(seats={name: left for name, left in train.seats.items()
                                        if not watch['seats'] or name in watch['seats']})


def alert(watch, trains, clock):
    """新有票的车 → 发给用户的话。"""
    lines = ['%s %s %s → %s %s：%s' % (
        t.code, t.start[1], t.departs, t.end[1], t.arrives,
        '，'.join(name + (left if left == '有' else ' %s 张' % left)
                 for name, left in t.seats.items())) for t in trains[:15]]
    if len(trains) > 15:
        lines.append('… 还有 %d 趟' % (len(trains) - 15))
    return easywechat.plain_text('有票了，%s\n%s\n（%s 看到的）' % (describe(watch), '\n'.join(lines), clock))


def as_text(watches):
    """存下的内容。note 里有钟点，每看一次都变，不在里面。"""
    kept = [{k: v for k, v in watch.items() if k != 'note'} for watch in watches]
    return json.dumps({'watches': kept}, ensure_ascii=False)


def open_state():
    """→（存储，里面的监控）；读不懂的另外留着，从头来；读写不了的现在就说 (`ConfigError`)。"""
    try:
        store = easywechat.FileStore(easywechat.state_folder())
        data = store.get(NAME) or b'{"watches": []}'
        try:
            watches = json.loads(data.decode('utf-8'))['watches']
            for watch in watches:
                describe(watch), sale_begins(watch), dict(watch['seen']), watch['user'] + ''
                (_, _), (_, _) = watch['codes'], watch['exact']
        except (ValueError, LookupError, TypeError) as e:
            logger.error('the state is broken：从头开始记，原来的留在 %s.broken（%r）', NAME, e)
            store.set(NAME + '.broken', data)
            watches = []
        store.set(NAME, as_text(watches).encode('utf-8'))
        return store, watches
    except OSError as e:
        raise easywechat.ConfigError('写不了 %s：%s；用环境变量 XDG_STATE_HOME 指定一个能写的目录' % (
            e.filename, e.strerror)) from None


class Watcher:
    """所有人的监控：`answer` 在回调的线程里答话，`step` 在自己的线程里看票。"""

    #: 同一条路线、同一天，至少隔几秒再看。
    every = 60

    _now = staticmethod(time.monotonic)
    _wall = staticmethod(time.time)

    def __init__(self, railway, send, store, watches):
        self.railway = railway
        self.send = send            # send（文本，用户），不成抛 APIError
        self.store = store          # 里面是 watches
        self.watches = watches
        self._saved = as_text(watches)
        self._due = {}              # 路线 → 什么时候再看
        self._end_due = 0
        self._lock = threading.Lock()

    def _china(self):
        return datetime.datetime.fromtimestamp(self._wall(), CHINA)

    # 答话

    def answer(self, msg):
        """回调：一句话 → 一句话。"""
        match = re.fullmatch(r'\W*(监控|取消|列表)\W*(.*?)\W*', msg['Content'].translate(FOLD), re.S)
        if not match:
            return HELP
        try:
            with self._lock:
                return {'监控': self._add, '取消': self._cancel, '列表': self._list}[match.group(1)](
                    msg['FromUserName'], match.group(2))
        except ValueError as e:
            return str(e)
        except OSError as e:
            logger.error('cannot write %s: %s', e.filename, e.strerror)
            return '磁盘写不进去，没有改：看它满了没有'

    def _of(self, user):
        return [watch for watch in self.watches if watch['user'] == user]

    def _keep(self, watches):
        text = as_text(watches)
        if text != self._saved:
            self.store.set(NAME, text.encode('utf-8'))
        self.watches, self._saved = watches, text

    def _add(self, user, text):
        if not self.railway.stations:
            raise ValueError('还没有 12306 的车站表：%s。过几分钟再说一次' % (self.railway.trouble or '正在取'))
        today = self._china().date()
        watch = dict(parse_watch(text, self.railway.stations, today), user=user)
        mine = self._of(user)
        if describe(watch) in [describe(other) for other in mine]:
            raise ValueError('已经在看了：' + describe(watch))
        if len(mine) >= MOST:
            raise ValueError('每个人最多监控 %d 个，先取消一个，例如：取消 1' % MOST)
        self._keep(self.watches + [watch])
        later = '\n%s 才开始卖，到那天开始看' % sale_begins(watch) if sale_begins(watch) > today else ''
        return '开始监控 %s，有票了告诉你%s' % (describe(watch), later)

    def _cancel(self, user, text):
        mine, words = self._of(user), re.findall(r'[^\s,第个条号和]+', text)
        known = dict(zip('一二三四五六七八九十', mine), **{str(n): watch for n, watch in enumerate(mine, 1)})
        if not mine:
            return '没有在监控的'
        if words not in ([], ['全部'], ['所有']):
            if not set(words) <= set(known):
                raise ValueError('写成：取消 2，是「列表」里的第几个，现在有 %d 个' % len(mine))
            mine = [known[word] for word in words]
        self._keep([watch for watch in self.watches if watch not in mine])
        return '取消了：\n' + '\n'.join(map(describe, mine))

    def _list(self, user, text):
        today = self._china().date()
        lines = ['%d. %s（%s）' % (n, describe(watch), '%s 开始卖' % sale_begins(watch)
                                 if sale_begins(watch) > today else watch.get('note', '还没有看过'))
                 for n, watch in enumerate(self._of(user), 1)]
        if lines and self.railway.failures:
            lines.append('12306 现在不答应：%s。%d 秒以后再问' % (
                self.railway.trouble, max(0, self.railway.not_before - self._now())))
        return '\n'.join(lines) or '没有在监控的'

    # 看票

    def _notify(self, watch, text):
        """发出去了，或者再发也没有用，是 True。不知道送到没有的算没有：收到两遍好过一遍也没有。"""
        try:
            self.send(text, watch['user'])
        except easywechat.APIError as e:
            logger.error('not sent to %s: %s', watch['user'], e)
            return e.errcode == 81013       # 没有这个人，或者不给他看了
        return True

    def _end(self, today):
        """日期过了的，说一声，不再看。"""
        over = [watch for watch in self.watches if watch['date'] < today
                and self._notify(watch, describe(watch) + ' 过了，不再监控')]
        if over:
            with self._lock:
                self._keep([watch for watch in self.watches if watch not in over])

    def _look(self, watch, trains, clock):
        """``trains`` 里新有票的发出去；没有发成的不记作看到过，下次再发。"""
        trains = list(wanted(watch, trains))
        count = len([t for t in trains if t.seats])
        watch['note'] = '%s 看过，%d 趟车，%d 趟有票' % (clock, len(trains), count)
        old = [(code, seat) for code, seat in watch['seen']]
        now = [(t.code, seat) for t in trains for seat in t.seats]
        fresh = [t._replace(seats={seat: left for seat, left in t.seats.items()
                                   if (t.code, seat) not in old}) for t in trains]
        fresh = [t for t in fresh if t.seats]
        if fresh and not self._notify(watch, alert(watch, fresh, clock)):
            now = [seat for seat in now if seat in old]
        watch['seen'] = now

    def _visit(self, route):
        """看一条路线，它的监控都用这一次的结果。一趟车也没有不算票没了：卖完的车也在里面。"""
        self._due[route] = self._now() + self.every
        trains = self.railway.ask(*route)
        clock = self._china().strftime('%H:%M')
        for watch in self.watches:
            if route == route_of(watch) and trains:
                self._look(watch, trains, clock)
            elif route == route_of(watch):
                watch['note'] = clock + ' 看过，没有直达的车'
        with self._lock:
            self._keep(self.watches)

    def step(self):
        """到时候了的事，做一件。"""
        now, today = self._now(), str(self._china().date())
        if now >= self._end_due:
            self._end_due = now + self.every
            self._end(today)
        self._due = {route: self._due.get(route, 0) for route in [
            route_of(watch) for watch in self.watches
            if str(sale_begins(watch)) <= today <= watch['date']]}
        due = [route for route in self._due if self._due[route] <= now]
        if now < self.railway.not_before:
            return
        with contextlib.suppress(Refused):      # 写了日志，也算好了等多久
            if due and (self.railway.stations or self.railway.failures):
                self._visit(min(due, key=self._due.get))
            elif not self.railway.stations:
                self.railway.ask()


def watch(watcher, stop):
    """看票，直到 ``stop`` (Event)。"""
    pause = 1               # 没有监听成的，不去问 12306
    while not stop.wait(pause):
        try:
            watcher.step()
            pause = 1
        except Exception:       # 磁盘满了，或者没有想到的：线程没了，人还以为在看
            logger.exception('the watch goes on in a minute')
            pause = 60


def main(argv=None):
    parser = argparse.ArgumentParser(description='12306 余票监控。')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    parser.add_argument('--base', default=BASE, metavar='URL', help='12306 的地址（默认 %s）' % BASE)
    args, stop = parser.parse_args(argv), threading.Event()
    if not re.match('https?://.', args.base):
        raise easywechat.ConfigError('--base 要写成 http://… 或 https://…')
    server = easywechat.WeChatServer('demo', needs=('secret', 'agentid'))
    watcher = Watcher(Railway(args.base), server.send, *open_state())
    server.register_callback('text', watcher.answer)
    threading.Thread(target=watch, args=(watcher, stop), daemon=True).start()
    try:
        server.run(port=args.port)
    finally:
        stop.set()


if __name__ == '__main__':
    easywechat.command(main)
