"""A browser on the simulator's page: browser.py [--keep] [FOLDER]. Debian's chromium, headless, and a bot of its own.

It says `你好`, sends a picture, presses a menu's button and a card's, waits for a callback of seven seconds and loses
answers. Then a scripted 智能机器人 lets bubbles grow in a single chat and a group. No error on the console, no request
to another host. Pictures of the page, light, dark and 360 pixels wide, of every kind of message, the menus, the panel
and the raw text go into FOLDER; --keep writes the one that the README shows, examples/simulator.png.
"""
import argparse
import base64
import json
import os
import re
import struct
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import zlib

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path[:0] = [os.path.join(ROOT, 'examples'), ROOT]

import easywechat  # noqa: E402
import simulator  # noqa: E402

BOT = r'''
import sys, time
sys.path.insert(0, sys.argv[1])
import easywechat

CARD = {'card_type': 'button_interaction', 'source': {'desc': 'NAS'}, 'task_id': 'job-7', 'main_title': {
    'title': '备份失败', 'desc': '昨天 23:10'}, 'horizontal_content_list': [{'keyname': '磁盘', 'value': 'sda1 91%'},
    {'keyname': '负责人', 'type': 3, 'userid': 'lisi'}], 'button_list': [{'text': '再试一次', 'key': 'again'},
    {'text': '不管', 'style': 2, 'key': 'no'}]}
URL = 'https://e.x/'
OPTIONS = [{'id': 'a', 'text': '十六个字的选项十六个字的选项十六'}, {'id': 'b', 'text': '第二个', 'is_checked': True}]
SHOWN = [
    {'msgtype': 'markdown', 'markdown': {'content': '# 备份\n**失败** <font color="warning">2 次</font>,见 [日志](https://e.x/)\n'
                                         '> 磁盘 `sda1`\n最后一行'}},
    {'msgtype': 'textcard', 'textcard': {'title': '备份失败', 'description': '<div class="gray">23:10</div>'
                                         '<div class="highlight">sda1 满了</div>', 'url': URL}},
    {'msgtype': 'template_card', 'template_card': {
        'card_type': 'text_notice', 'source': {'desc': 'NAS', 'desc_color': 2}, 'main_title': {
            'title': '每日报告', 'desc': '一切都好'}, 'emphasis_content': {'title': '91%', 'desc': '最满的磁盘'},
        'quote_area': {'type': 1, 'url': URL, 'title': '昨天', 'quote_text': '张三:好了吗\n李四:好了'},
        'sub_title_text': '第一行\n第二行', 'jump_list': [{'title': '面板', 'type': 1, 'url': URL}],
        'card_action': {'type': 1, 'url': URL}}},
    {'msgtype': 'template_card', 'template_card': {
        'card_type': 'button_interaction', 'task_id': 'links', 'main_title': {'title': '两种按钮'},
        'button_selection': {'question_key': 's', 'title': '哪一块', 'option_list': OPTIONS},
        'action_menu': {'desc': '更多', 'action_list': [{'text': '不再提醒', 'key': 'm'}]},
        'button_list': [{'text': '看日志', 'type': 1, 'url': URL, 'style': 2}, {'text': '重启', 'key': 'r'}]}},
    {'msgtype': 'template_card', 'template_card': {
        'card_type': 'vote_interaction', 'task_id': 'vote', 'main_title': {'title': '几点重启'},
        'checkbox': {'question_key': 'q', 'mode': 1, 'option_list': OPTIONS},
        'submit_button': {'text': '提交', 'key': 's'}}},
]


def text(msg):
    if msg['Content'] == '慢':
        time.sleep(7)
    if msg['Content'] == '备份好了吗':
        return {'msgtype': 'template_card', 'template_card': CARD}
    return msg['Content'] + '!'


def image(msg):
    if msg['FromUserName'] != 'lisi':
        return msg
    for message in [{'msgtype': 'news', 'news': {'articles': [
            {'title': '图文', 'description': '一张图,一段话', 'url': URL, 'picurl': msg['PicUrl']},
            {'title': '第二条', 'url': URL, 'picurl': 'https://e.x/p.png'}]}}] + SHOWN:
        server.client.send(message, to=msg['FromUserName'])
    return '看 https://e.x/a?b=1。还有 https://e.x/c, 以及 <a href="https://e.x/">这里</a>.'


server = easywechat.WeChatServer('demo', bot_id='')     # the 智能机器人 is `Talker`
server.client.call('menu/create', {'button': [{'type': 'click', 'name': '状态', 'key': 'status'}] + [
    {'name': name, 'sub_button': [{'type': 'click', 'name': '帮助', 'key': 'help'}, {
        'type': 'click', 'name': '十三个汉字的菜单名字这么长', 'key': 'long'}, {
        'type': 'click', 'name': 'forty bytes of an ASCII name, wide enoug', 'key': 'ascii'}]}
    for name in ('更多', '别的')]}, agentid=1000002)
server.register_callback('text', text)
server.register_callback('image', image)
server.register_callback('event:click', lambda msg: '你点了 ' + msg['EventKey'])
server.register_callback('event:enter_agent', lambda msg: '欢迎')
server.register_callback('event:template_card_event', lambda msg: {'MsgType': 'update_button', 'Button': {
    'ReplaceName': '已经在备份'}})
server.run(host='127.0.0.1', port=0)
'''


def png(width, height):
    """A picture to send: a plain gradient."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + b''.join(bytes((60 + y // 2, 110 + x // 3, 170)) for x in range(width))
                    for y in range(height))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) \
        + chunk(b'IDAT', zlib.compress(rows, 9)) + chunk(b'IEND', b'')


PROSE = '''<think>先看磁盘，再看日志。</think># 备份
**失败** 了 2 次，见 [日志](https://e.x/)，`backup.sh` 停在：

| 磁盘 | 用了 | 还有 |
|---|---:|---|
| sda1 | 91% | 12 GB |
| sdb1 | 40% | 1.2 TB，很长很长很长的一格，放在这里看会怎样 |

1. 删掉旧的快照
   - 先停服务
2. 再跑一次
> 昨天也是
---
```
df -h | sort -k5 -r | head -n 3 && echo "a long line that scrolls inside of its bubble"
```
<script>alert(1)</script>'''
CARD = {'card_type': 'button_interaction', 'task_id': 'job-7', 'main_title': {'title': '备份失败', 'desc': '23:10'},
        'button_selection': {'question_key': 'disk', 'title': '哪一块', 'option_list': [
            {'id': 'a', 'text': 'sda1'}, {'id': 'b', 'text': 'sdb1'}]},
        'button_list': [{'text': '再试一次', 'key': 'again'}, {'text': '不管', 'style': 2, 'key': 'no'}]}


class Talker:
    """A 智能机器人. A stream goes on when ``go`` is set; what it heard is in ``heard``."""

    def __init__(self, settings):
        self.go, self.heard = threading.Semaphore(0), queue.Queue()
        self.server = easywechat.WeChatServer('talk', **settings)
        self.server.bot.slow_after, self.server.bot.frame_every, self.server.answer_within = 0.1, 0.05, 0.3
        self.server.register_callback('*', self.answer)
        self.server.start()

    def answer(self, msg):
        self.heard.put(msg)
        event, text = msg.get('Event'), msg['text']['content'] if 'text' in msg else msg['MsgType']
        if event == 'enter_chat':
            return '您好，我是小助手'
        if event == 'template_card_event':
            return {'response_type': 'update_template_card', 'template_card': dict(
                CARD, main_title={'title': '在备份了'}, replace_text='已经在备份')}
        if event:
            return None
        if '备份怎么样' in text:
            return easywechat.Stream(self.pieces())
        if '卡片' in text:
            return {'msgtype': 'template_card', 'template_card': CARD}
        if '评价' in text:
            return {'msgtype': 'stream', 'stream': {'id': 's', 'content': '怎么样？', 'finish': True,
                                                    'feedback': {'id': 'F'}}}
        return '听到 **%s**' % text

    def pieces(self):
        for begin, end in (0, 9), (9, 60), (60, None):
            self.go.acquire()
            yield PROSE[begin:end]

    def next(self, **fields):
        """The next that it heard with these fields."""
        while True:
            msg = self.heard.get(timeout=5)
            if all(msg.get(name) == value for name, value in fields.items()):
                return msg


class Page:
    """The page in a browser."""

    def __init__(self, url):
        options = webdriver.ChromeOptions()
        options.binary_location = '/usr/bin/chromium'
        for argument in '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage':
            options.add_argument(argument)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService('/usr/bin/chromedriver'))
        self.look(1000, 760)
        self.driver.get(url)
        self.wait(lambda: self.texts('#bot')[0] != '连接中…')

    def look(self, width, height, scheme='light'):
        self.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
            'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': width < 500})
        self.driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {
            'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})

    def wait(self, condition, seconds=10):
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda driver: condition())

    def texts(self, css):
        return self.driver.execute_script(
            'return [...document.querySelectorAll(arguments[0])].map(node => node.innerText)', css)

    def count(self, css, text=None):
        return len([t for t in self.texts(css) if text in (None, t.strip())])

    def click(self, css, text=None):
        nodes = self.driver.find_elements(By.CSS_SELECTOR, css)
        next(node for node in nodes if text in (None, node.text.strip())).click()

    def say(self, text):
        self.driver.find_element(By.ID, 'text').send_keys(text, Keys.ENTER)

    def heard(self, text, seconds=10):
        """Wait for a bubble of the bot with this text."""
        self.wait(lambda: self.count('.passive .bubble, .active .bubble', text), seconds)
        return True

    def picture(self, folder, name):
        path = os.path.join(folder, name)
        data = self.driver.execute_cdp_cmd('Page.captureScreenshot', {'format': 'png', 'optimizeForSpeed': False})
        with open(path, 'wb') as f:
            f.write(base64.b64decode(data['data']))
        return os.path.getsize(path)

    def narrow(self):
        """Nothing is wider than the window."""
        return self.driver.execute_script('return [...document.querySelectorAll("html, #log")].every('
                                          'node => node.scrollWidth <= node.clientWidth)')

    def errors(self):
        return [entry['message'] for entry in self.driver.get_log('browser') if entry['level'] == 'SEVERE']

    def hosts(self):
        """The hosts that were asked for anything."""
        events = [json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance')]
        urls = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
        return {urllib.parse.urlsplit(u).hostname for u in urls if not u.startswith(('data:', 'blob:', 'chrome:'))}


def checks(page, folder):
    """What is done, one after another → (name, whether it went right)."""
    page.say('你好')
    yield '你好 is echoed', page.heard('你好!')
    page.click('#more')
    page.driver.find_element(By.NAME, 'image').send_keys(os.path.join(folder, '照片.png'))
    shown = 'return [...document.querySelectorAll(".passive img")].map(node => node.naturalWidth)'
    page.wait(lambda: page.driver.execute_script(shown) == [240])
    yield 'a picture comes back', page.count('.me img') == 1
    page.click('#tools button', '进入应用')
    yield 'the app is entered', page.heard('欢迎')
    page.click('#more')
    page.click('#menu button', '状态')
    yield "a menu's button is pressed", page.heard('你点了 status')
    page.click('#menu button', '≡ 更多')
    page.click('#menu li button', '帮助')
    yield 'one of a sub-menu', page.heard('你点了 help')
    Select(page.driver.find_element(By.ID, 'lost')).select_by_value('2')
    page.say('丢')
    page.wait(lambda: any('第 3 次' in text for text in page.texts('.me .meta')))
    Select(page.driver.find_element(By.ID, 'lost')).select_by_value('0')
    yield 'a lost answer is asked for again', page.heard('丢!')
    page.click('#wrong_token')
    page.say('谁')
    page.wait(lambda: any('403' in text for text in page.texts('.me .meta')))
    page.click('#wrong_token')
    yield 'a wrong Token is refused', not page.count('.bubble', '谁!')
    Select(page.driver.find_element(By.ID, 'user')).select_by_value('lisi')
    yield 'another member sees nothing of it', page.count('.bubble') == 0
    page.say('慢')
    page.heard('慢!', 20)
    page.say('好')
    page.heard('好!')
    yield 'seven seconds, one answer', page.count('.bubble', '慢!') == 1
    page.click('.active .meta button')
    raw = '\n'.join(page.texts('#raw pre'))
    page.click('#raw button', '关闭')
    yield 'the raw text is there', '"content": "慢!"' in raw and '"msgid"' in raw
    yield from kinds(page, folder)
    Select(page.driver.find_element(By.ID, 'user')).select_by_value('wangwu')
    page.say('早上好')
    page.heard('早上好!')
    page.say('备份好了吗')
    page.wait(lambda: page.count('.acts button', '再试一次'))
    page.look(800, 640)
    yield 'the README picture is small', page.picture(folder, 'readme.png') <= 80 << 10
    page.click('.acts button', '再试一次')
    page.wait(lambda: page.count('.acts button:disabled', '已经在备份'))
    yield "a card's button changes the card", page.count('.acts button') == 1


def kinds(page, folder):
    """Every kind of message to lisi, sub-menus and the panel, wide and narrow."""
    page.click('#more')
    page.driver.find_element(By.NAME, 'image').send_keys(os.path.join(folder, '照片.png'))
    page.click('#more')
    page.wait(lambda: page.count('.passive a', '这里'))
    links = page.driver.execute_script('return [...document.querySelectorAll(".passive a")].map(node => node.href)')
    yield 'a link ends before its punctuation', links[-3:] == ['https://e.x/a?b=1', 'https://e.x/c', 'https://e.x/']
    yield "a link among a card's buttons", page.count('.acts a', '看日志') == 1
    yield 'the lines of a quotation', '张三:好了吗\n李四:好了' in page.texts('.quote')[0]
    page.look(440, 1900)
    page.click('.card summary')
    page.picture(folder, 'kinds.png')
    page.look(440, 1900, 'dark')
    page.picture(folder, 'kinds-dark.png')
    page.look(360, 740)
    for n, name in (2, '≡ 更多'), (3, '≡ 别的'):
        page.click('#menu button', name)
        page.picture(folder, 'menu-%d.png' % n)
        yield 'the whole menu %d is seen' % n, page.driver.execute_script(
            'const box = document.querySelector("#menu ul:not([hidden])").getBoundingClientRect();'
            'return box.left >= 0 && box.right <= innerWidth')
        page.click('#menu button', name)
    page.click('#switch')
    page.picture(folder, 'panel.png')
    page.click('#switch')
    page.click('.passive:last-child .meta button')
    page.picture(folder, 'raw.png')
    page.click('#raw button', '关闭')
    page.look(1000, 760)


def talk(page, folder, bot, program):
    """The same with the 智能机器人 → (name, whether it went right)."""
    page.click('#chats button', '小助手')
    yield 'who opens the chat is welcomed', page.heard('您好，我是小助手')
    page.say('备份怎么样')
    growing = 'return [...document.querySelectorAll(".growing")].map(node => node.innerText)'
    for name, sign in (('think', '思考中…'), ('thinking', '先看'), ('growing', '备份')):
        page.wait(lambda sign=sign: sign in ''.join(page.driver.execute_script(growing)))
        page.picture(folder, 'bot-%s.png' % name)
        program.go.release()
    page.wait(lambda: page.count('.prose table') and not page.count('.growing'))
    yield 'a bubble grows and closes', [(b['frames'] > 3, b['finished']) for b in bot.bubbles[1:]] == [(True, True)]
    text = page.texts('.prose')[-1]
    yield 'its thoughts are folded', '思考过程' in text and '先看磁盘' not in text
    yield 'its Markdown is text and nothing else', '<script>alert(1)</script>' in text and '**' not in text
    yield from looks(page, folder, 'bot-')
    page.say('评价')
    page.heard('怎么样？')
    page.click('.passive .meta button', '不准确')
    rated = program.next(Event='feedback_event')
    yield 'a bubble is rated', (rated['Id'], rated['Type']) == ('F', '2')
    page.say('卡片')
    page.wait(lambda: page.count('.acts button', '再试一次'))
    Select(page.driver.find_element(By.CSS_SELECTOR, '.card select')).select_by_value('b')
    page.click('.acts button', '再试一次')
    page.wait(lambda: page.count('.acts button:disabled', '已经在备份'))
    pressed = program.next(Event='template_card_event')
    yield "a card's button and choice arrive", (pressed['EventKey'], pressed['SelectedItems']['SelectedItem']) == (
        'again', [{'QuestionKey': 'disk', 'OptionIds': {'OptionId': ['b']}}])
    page.click('#more')
    for kind in 'image', 'file':
        page.driver.find_element(By.NAME, kind).send_keys(os.path.join(folder, '照片.png'))
        page.heard('听到 ' + kind)
    page.picture(folder, 'bot-files.png')
    page.click('#more')
    kinds = [program.heard.get(timeout=5)['MsgType'] for _ in range(2)]
    yield 'a picture and a file go out', kinds == ['image', 'file']
    yield from group(page, folder, bot, program)
    Select(page.driver.find_element(By.ID, 'fault')).select_by_value('error')
    page.click('#do_fault')
    page.wait(lambda: page.count('#armed', '下一个 ack 是错误 6000'))
    page.say('@小助手 错')
    page.wait(lambda: any('6000' in note for note in page.texts('.note.bad')))
    yield 'a fault is asked for', not bot.faults.armed
    Select(page.driver.find_element(By.ID, 'fault')).select_by_value('close')
    page.click('#do_fault')
    page.wait(lambda: '还没有连上' in page.texts('#bot')[0])
    page.click('#chats button', '监控')
    yield 'the app is what it was', page.count('.bubble') == 0 and page.count('#expire') == 1


def group(page, folder, bot, program):
    bot.say('lisi', '早', chat='group')
    page.wait(lambda: page.count('#chats .new', '值班群'))
    page.click('#chats button', '值班群')
    page.heard('听到 @小助手 早')
    yield 'another member stands on the left', page.texts('.other .bubble') == ['@小助手 早']
    page.say('谁在')
    page.wait(lambda: page.count('.note.bad', '没有 @小助手，机器人收不到'))
    page.click('.passive .meta button', '引用')
    page.click('#more')
    page.click('#tools button', '@ 机器人')
    page.click('#more')
    page.say('对')
    page.heard('听到 @小助手 对')
    heard = [program.heard.get(timeout=5) for _ in range(2)]
    yield 'it hears its name, and what is quoted', [(m['Content'], m.get('Quote')) for m in heard] == [
        ('早', None), ('对', {'MsgType': 'text', 'Content': '听到 **@小助手 早**'})]
    yield from looks(page, folder, 'group-')
    page.look(360, 740)
    page.click('#switch')
    page.picture(folder, 'group-panel.png')
    page.click('#switch')
    page.look(1000, 760)


def looks(page, folder, prefix=''):
    for name, width, height, scheme in (('light', 1000, 760, 'light'), ('dark', 1000, 760, 'dark'),
                                        ('narrow', 360, 740, 'light'), ('narrow-dark', 360, 740, 'dark')):
        page.look(width, height, scheme)
        page.picture(folder, prefix + name + '.png')
        yield '%s: no horizontal scrolling' % (prefix + name), page.narrow()
    page.look(1000, 760)
    errors, hosts = page.errors(), page.hosts()
    yield 'no error on the console: %s' % errors, not errors
    yield 'no other host is asked: %s' % hosts, hosts == {'127.0.0.1'}


def run_talk(folder):
    """→ the checks of the 智能机器人."""
    wecom, page, done = simulator.WeCom(), None, []
    wecom.start()
    try:
        program = Talker(wecom.bot_settings)
        page = Page(wecom.page)
        done += talk(page, folder, wecom.bot, program)
        done += looks(page, folder, 'after-')
    finally:
        if page:
            page.driver.quit()
        wecom.stop()
    return done + [('no problem for WeCom: %s' % wecom.bot.problems, not wecom.bot.problems)]


def run(folder):
    """→ the checks that failed, and how many there were."""
    with open(os.path.join(folder, '照片.png'), 'wb') as f:
        f.write(png(240, 135))
    with open(os.path.join(folder, 'bot.py'), 'w', encoding='utf-8') as f:
        f.write(BOT)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'examples', 'simulator.py'),
                                os.path.join(folder, 'bot.py'), ROOT], stdout=subprocess.PIPE)
    page, done = None, []
    try:
        page = Page(re.search(r'聊天页: (\S+)', process.stdout.readline().decode()).group(1))
        for check in checks, looks:
            done += check(page, folder)
    finally:
        if page:
            page.driver.quit()
        process.terminate()
        done.append(('the simulator ends with 0', process.wait(20) == 0))
    done += run_talk(folder)
    return [name for name, good in done if not good], len(done)


def main():
    parser = argparse.ArgumentParser(description='Drive the page of examples/simulator.py.')
    parser.add_argument('--keep', action='store_true', help='write examples/simulator.png')
    parser.add_argument('folder', nargs='?', help='where the pictures go')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.abspath(args.folder or temporary)
        os.makedirs(folder, exist_ok=True)
        failures, total = run(folder)
        if args.keep:
            with open(os.path.join(folder, 'readme.png'), 'rb') as f, \
                    open(os.path.join(ROOT, 'examples', 'simulator.png'), 'wb') as kept:
                kept.write(f.read())
    for name in failures:
        print('failed: ' + name)
    print('browser: %d passed, %d failed' % (total - len(failures), len(failures)))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
