"""A browser on the simulator's page: browser.py [--keep] [FOLDER]. Debian's chromium, headless, and a bot of its own.

It says `你好`, sends a picture, presses a menu's button and a card's, waits for a callback of seven seconds and loses
answers; its bot raises, says nothing, exits, is started again and changed on disk. Then a scripted 智能机器人 lets
bubbles grow in a single chat and a group, and the simulator stops and comes back. No error on the console, no request
to another host. Pictures of the page at 1920, 1280 and 360 pixels, light and dark, of every kind of message, the menus
and the timeline go into FOLDER; --keep writes those that the README shows into examples/.
"""
import argparse
import base64
import json
import os
import queue
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path[:0] = [os.path.join(ROOT, 'examples'), ROOT]

import easywechat  # noqa: E402
import simulator  # noqa: E402

BOT = r'''
import os, sys, time
sys.path.insert(0, sys.argv[1])
import easywechat

CARD = {'card_type': 'button_interaction', 'source': {'desc': 'NAS'}, 'task_id': 'job-7', 'main_title': {
    'title': '备份失败', 'desc': '昨天 23:10'}, 'horizontal_content_list': [{'keyname': '磁盘', 'value': 'sda1 91%'},
    {'keyname': '负责人', 'type': 3, 'userid': 'lisi'}], 'button_list': [{'text': '再试一次', 'key': 'again'},
    {'text': '不管', 'style': 2, 'key': 'no'}]}
URL = 'https://e.x/'
OPTIONS = [{'id': 'a', 'text': '十六个字的选项十六个字的选项十六'}, {'id': 'b', 'text': '第二个', 'is_checked': True}]
SHOWN = [
    {'msgtype': 'markdown', 'markdown': {'content': '# 备份\n**失败** <font color="warning">2 次</font>，见 [日志](https://e.x/)\n'
                                         '> 磁盘 `sda1`\n最后一行'}},
    {'msgtype': 'textcard', 'textcard': {'title': '备份失败', 'description': '<div class="gray">23:10</div>'
                                         '<div class="highlight">sda1 满了</div>', 'url': URL}},
    {'msgtype': 'template_card', 'template_card': {
        'card_type': 'text_notice', 'source': {'desc': 'NAS', 'desc_color': 2}, 'main_title': {
            'title': '每日报告', 'desc': '一切都好'}, 'emphasis_content': {'title': '91%', 'desc': '最满的磁盘'},
        'quote_area': {'type': 1, 'url': URL, 'title': '昨天', 'quote_text': '张三：好了吗\n李四：好了'},
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
    if msg['Content'] == '退':
        print('磁盘满了', file=sys.stderr)
        os._exit(3)
    if msg['Content'] in UNSENDABLE:
        return UNSENDABLE[msg['Content']]()
    return msg['Content'] + '！'


UNSENDABLE = {'坏': lambda: {}['磁盘'], '空': lambda: None, '怪': object,
              '卡': lambda: {'msgtype': 'textcard', 'textcard': {}}}


def image(msg):
    if msg['FromUserName'] != 'lisi':
        return msg
    for message in [{'msgtype': 'news', 'news': {'articles': [
            {'title': '图文', 'description': '一张图，一段话', 'url': URL, 'picurl': msg['PicUrl']},
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


def png(width, height, rows, palette=None):
    """→ a PNG: rows of RGB, or of indices into a palette."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', width, height, 8, 3 if palette else 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + (chunk(b'PLTE', palette) if palette else b'') + chunk(
        b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows), 9)) + chunk(b'IEND', b'')


def photo():
    """A picture to send: a plain gradient."""
    return png(240, 135, [b''.join(bytes((60 + y // 2, 110 + x // 3, 170)) for x in range(240)) for y in range(135)])


#: A PNG in base64 → its width, its 256 commonest colours, and the index of the nearest for each pixel.
FEW_COLOURS = '''
const [text, done] = arguments, colours = new Map(), nearest = new Map();
createImageBitmap(new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))])).then(image => {
  const pen = new OffscreenCanvas(image.width, image.height).getContext('2d');
  pen.drawImage(image, 0, 0);
  const pixels = new Uint32Array(pen.getImageData(0, 0, image.width, image.height).data.buffer);
  for (const pixel of pixels) colours.set(pixel, (colours.get(pixel) || 0) + 1);
  const bytes = colour => [colour & 255, colour >> 8 & 255, colour >> 16 & 255];
  const kept = [...colours].sort((a, b) => b[1] - a[1]).slice(0, 256).map(([colour]) => bytes(colour));
  for (const colour of colours.keys()) {
    const far = kept.map(one => one.reduce((sum, v, n) => sum + (v - bytes(colour)[n]) ** 2, 0));
    nearest.set(colour, far.indexOf(Math.min(...far)));
  }
  done([image.width, kept.flat(), [...pixels].map(pixel => nearest.get(pixel))]);
});'''


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
        table = PROSE.index('| sdb1')
        for begin, end in (0, 9), (9, table), (table, None):
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
        self.driver.execute_cdp_cmd('Page.setInterceptFileChooserDialog', {'enabled': True})
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

    def has(self, css, text):
        """Wait until one of these contains this text."""
        return self.wait(lambda: any(text in t for t in self.texts(css)))

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def click(self, css, text=''):
        """The first that is seen and contains this text."""
        def clicked():
            nodes = [n for n in self.driver.find_elements(By.CSS_SELECTOR, css) if n.is_displayed() and text in n.text]
            nodes[0].click()
            return True
        WebDriverWait(self.driver, 10, 0.05, [StaleElementReferenceException, IndexError]).until(lambda _: clicked())

    def choose(self, css, value):
        Select(self.driver.find_element(By.CSS_SELECTOR, css)).select_by_value(value)

    def pick(self, kind, path):
        self.click('#tools button', kind)
        self.driver.find_element(By.ID, 'chosen').send_keys(path)

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def give(self, how, name, size, data=b''):
        """Paste or drop a file of this many bytes."""
        self.js('''
            const [how, name, size, data] = arguments, box = new DataTransfer(), bytes = new Uint8Array(size);
            bytes.set(Uint8Array.from(atob(data), c => c.charCodeAt(0)));
            box.items.add(new File([bytes], name));
            document.body.dispatchEvent(how === 'drop' ? new DragEvent('drop', {dataTransfer: box, bubbles: true})
                : new ClipboardEvent('paste', {clipboardData: box, bubbles: true, cancelable: true}));''',
                how, name, size, base64.b64encode(data).decode())
        self.wait(lambda: self.count('#ask[open]'))

    def say(self, text):
        self.driver.find_element(By.ID, 'text').send_keys(text, Keys.ENTER)

    def heard(self, text, seconds=10):
        """Wait for a bubble of the bot with this text."""
        self.wait(lambda: self.count('.passive .bubble, .active .bubble', text), seconds)
        return True

    def picture(self, folder, name):
        data = self.driver.execute_cdp_cmd('Page.captureScreenshot', {'format': 'png'})['data']
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(base64.b64decode(data))

    def small_picture(self, folder, name, most, css='body'):
        """A picture of a part for the README → whether it has at most this many KiB."""
        box = self.js('const {x, y, width, height} = document.querySelector(arguments[0]).getBoundingClientRect();'
                      'return {x, y, width, height, scale: 1}', css)
        data = self.driver.execute_cdp_cmd('Page.captureScreenshot', {'format': 'png', 'clip': box})['data']
        width, palette, pixels = self.driver.execute_async_script(FEW_COLOURS, data)
        rows = [bytes(pixels[at:at + width]) for at in range(0, len(pixels), width)]
        with open(os.path.join(folder, name), 'wb') as f:
            return f.write(png(width, len(rows), rows, bytes(palette))) <= most << 10

    def fits(self, width):
        """Nothing is wider than the window, and as many columns as there is room for."""
        widths = self.js('return ["#list", "main", "#panel"].map(css => document.querySelector(css).offsetWidth)')
        return self.js('return [...document.querySelectorAll("html, #log, #trace, #list")].every('
                       'node => node.scrollWidth <= node.clientWidth)') and [w > 0 for w in widths] == [
            width >= 700, True, width >= 1100] and (width < 1200 or widths[1] > 600) and (
            width > 400 or widths[1] == width)

    def steps(self):
        """The timeline → [(title, milliseconds)]."""
        return [(title.strip(), float(at[1:].split()[0])) for at, title in self.js(
            'return [...document.querySelectorAll("#steps li")].map(step => [step.querySelector("time").innerText,'
            '(step.querySelector("summary") || step.lastChild).textContent])')]

    def errors(self):
        return [entry['message'] for entry in self.driver.get_log('browser') if entry['level'] == 'SEVERE']

    def hosts(self):
        """The hosts that were asked for anything."""
        events = [json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance')]
        urls = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
        return {urllib.parse.urlsplit(u).hostname for u in urls if not u.startswith(('data:', 'blob:', 'chrome:'))}


def checks(page, folder):
    """What is done, one after another → (name, whether it went right)."""
    page.look(1280, 800)
    page.wait(lambda: '回调' in page.texts('#bot')[0] and page.count('#menu summary') == 2, 20)
    page.click('#hint button', '你好')
    yield '你好 is suggested and echoed', page.heard('你好！')
    yield 'the suggestions are gone', not page.driver.find_element(By.ID, 'hint').is_displayed()
    yield from timeline(page, folder)
    yield from keyboard(page)
    page.click('#more')
    page.pick('图片', os.path.join(folder, '照片.png'))
    shown = 'return [...document.querySelectorAll(".passive img")].map(node => node.naturalWidth)'
    page.wait(lambda: page.js(shown) == [240])
    yield 'a picture comes back', page.count('.me img') == 1
    page.click('.passive .zoom')
    yield 'it is seen large', page.js('return document.querySelector("#large[open] img").naturalWidth') == 240
    page.keys(Keys.ESCAPE)
    yield 'Escape closes it', not page.count('#large[open]')
    page.click('#tools button', '进入应用')
    yield 'the app is entered', page.heard('欢迎')
    page.click('#more')
    button = page.driver.find_element(By.CSS_SELECTOR, '#menu button')
    ActionChains(page.driver).click(button).pause(0.2).click(button).perform()
    yield "a menu's button is pressed", page.heard('你点了 status')
    page.click('#menu summary', '≡ 更多')
    page.click('#menu li button', '帮助')
    yield 'one of a sub-menu', page.heard('你点了 help')
    yield 'a double click presses once', page.count('.passive .bubble', '你点了 status') == 1
    page.choose('#lost', '2')
    page.say('丢')
    page.has('.me .meta', '第 3 次')
    page.choose('#lost', '0')
    yield 'a lost answer is asked for again', page.heard('丢！')
    page.choose('#wrong_token', 'true')
    page.say('谁')
    page.has('.me .meta', '403')
    page.choose('#wrong_token', 'false')
    yield 'a wrong Token is refused', not page.count('.bubble', '谁！')
    yield from silence(page, folder)
    yield from files(page, folder)
    page.click('#who button', '李四')
    yield 'another member sees nothing of it', page.count('.bubble') == 0
    page.say('慢')
    page.heard('慢！', 20)
    page.say('好')
    page.heard('好！')
    yield 'seven seconds, one answer', page.count('.bubble', '慢！') == 1
    page.click('.active .meta button')
    raw = '\n'.join(page.texts('#steps pre'))
    yield 'the raw text is there', '"content": "慢！"' in raw and '"msgid"' in raw
    yield 'a push is an exchange of its own', [title for title, _ in page.steps()] == [
        '机器人调用 /cgi-bin/message/send', '企业微信的回答']
    yield from kinds(page, folder)
    page.click('#who button', '王五')
    page.say('早上好')
    page.heard('早上好！')
    page.say('备份好了吗')
    page.wait(lambda: page.count('.acts button', '再试一次'))
    page.click('.acts button', '再试一次')
    page.wait(lambda: page.count('.acts button:disabled', '已经在备份'))
    yield "a card's button changes the card", page.count('.acts button') == 1
    yield from life(page, folder)


def timeline(page, folder):
    """`你好`, step by step."""
    page.wait(lambda: len(page.steps()) == 6)
    steps = page.steps()
    yield 'the steps of an exchange: %s' % steps, [title for title, _ in steps] == [
        '企业微信写好的明文', '加密、签名后的请求', '回调 text 开始', '回调 text 结束，1 条结果',
        '机器人的回答（密文）', '解密后的回复']
    yield 'their times ascend', 0 <= steps[0][1] < steps[2][1] <= steps[3][1] < steps[5][1] < 5000
    page.click('#steps summary', '加密、签名后的请求')
    texts = page.texts('#steps pre')
    yield 'what is sealed is seen on a click', '<Content><![CDATA[你好]]>' in texts[0] and 'msg_signature=' in texts[1]
    days = page.texts('#log .day')
    yield 'the day is written once', len(days) == 1 and days[0].startswith(time.strftime('%Y年%-m月%-d日'))
    page.click('#steps summary', '加密、签名后的请求')
    page.click('.passive .meta button')
    yield 'an answer belongs to the same exchange', page.steps() == steps and page.texts('#trace p') == ['张三：你好']


def keyboard(page):
    page.js('document.querySelector("#text").focus()')
    ActionChains(page.driver).send_keys('第一行').key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(
        Keys.SHIFT).send_keys('第二行', Keys.ENTER).perform()
    yield 'Shift+Enter is a line, Enter sends', page.heard('第一行\n第二行！')
    page.js('document.querySelector("#who button").focus()')
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    yield 'the arrows reach a chat', page.wait(lambda: page.texts('#name') == ['小助手'])
    page.keys(Keys.ARROW_UP, Keys.ENTER)
    yield 'and come back', page.wait(lambda: page.count('.me .bubble', '你好') == 1)
    page.click('#menu summary', '≡ 更多')
    page.keys(Keys.ESCAPE)
    yield 'Escape closes a menu', not page.count('#menu [open]')


def silence(page, folder):
    """Nothing is silent."""
    page.say('坏')
    yield 'a callback that raised is seen', page.has('.note.bad', "回调出错：KeyError: '磁盘'（bot.py 第 ")
    page.click('.note.bad details')
    yield 'with its traceback', page.has('.note.bad pre', 'Traceback')
    yield 'and in the timeline', page.has('#steps .wrong', '回调 text 出错')
    page.say('空')
    yield 'no answer is seen', page.has('.note', '没有回复：回调 text 返回了 None')
    page.say('怪')
    yield 'what cannot be sent is seen', page.wait(
        lambda: len([text for text in page.texts('.note.bad') if '回调出错' in text]) == 2)
    page.say('卡')
    yield 'what WeCom refuses is seen', page.has('.note.bad', 'message/send 被拒绝：41016')
    page.picture(folder, 'silence.png')


def files(page, folder):
    """Pasted, dropped, refused."""
    with open(os.path.join(folder, '照片.png'), 'rb') as f:
        data = f.read()
    page.give('paste', '截图.png', len(data), data)
    page.wait(lambda: page.count('#ask canvas'))
    page.picture(folder, 'paste.png')
    yield 'a pasted picture is shown first', '图片 · 截图.png' in page.texts('#ask .quote')[0]
    before = page.count('.me img')
    page.click('#ask .solid')
    yield 'and sent', page.wait(lambda: page.count('.me img') == before + 1 and not page.count('#ask[open]'))
    page.give('drop', '大图.jpg', 11 << 20)
    page.click('#ask .solid')
    yield 'a picture of 11 MB is refused', page.has('#ask .bad', '10 MB')
    page.click('#ask button', '取消')
    yield 'and nothing is sent', page.count('.me img') == before + 1
    page.give('drop', '日志.txt', 2048)
    page.click('#ask .solid')
    yield "a file's name and size are seen", page.wait(lambda: page.count('.me .doc', 'TXT\n日志.txt\n2 KB'))
    yield 'nobody answers a file', page.has('.note', '没有登记 file 的回调')
    page.click('#more')
    page.click('#tools button', '链接')
    page.click('#ask .solid')
    yield 'a link to nowhere is refused', page.wait(lambda: page.texts('#ask .bad') != [''])
    page.keys(Keys.ESCAPE)
    page.click('#more')
    yield 'and not sent', not page.count('.me .bubble a[href="https://"]')


def life(page, folder):
    """The bot exits, is started again, and changed on disk."""
    page.say('退')
    page.has('#banner', 'bot.py 退出了，退出码 3')
    page.picture(folder, 'exited.png')
    yield 'a bot that exits is shown with its last lines', '磁盘满了' in page.texts('#banner pre')[0]
    page.js('document.querySelector("#text").value = ""')
    page.click('#restart')
    page.wait(lambda: not page.driver.find_element(By.ID, 'banner').is_displayed())
    page.wait(lambda: '回调' in page.texts('#bot')[0], 20)
    page.say('又来了')
    yield 'a click starts it again', page.heard('又来了！')
    with open(os.path.join(folder, 'bot.py'), 'w', encoding='utf-8') as f:
        f.write(BOT.replace("+ '！'", "+ '，改过了'"))
    page.wait(lambda: '回调' not in page.texts('#bot')[0])
    page.wait(lambda: '回调' in page.texts('#bot')[0], 20)
    page.say('改了吗')
    yield 'a change on disk starts it again', page.heard('改了吗，改过了')


def kinds(page, folder):
    """Every kind of message to lisi, sub-menus and the panel, wide and narrow."""
    page.click('#more')
    page.pick('图片', os.path.join(folder, '照片.png'))
    page.click('#more')
    page.wait(lambda: page.count('.passive a', '这里'))
    links = page.driver.execute_script('return [...document.querySelectorAll(".passive a")].map(node => node.href)')
    yield 'a link ends before its punctuation', links[-3:] == ['https://e.x/a?b=1', 'https://e.x/c', 'https://e.x/']
    yield "a link among a card's buttons", page.count('.acts a', '看日志') == 1
    yield 'the lines of a quotation', '张三：好了吗\n李四：好了' in page.texts('.quote')[0]
    page.look(440, 1900)
    page.click('.card summary')
    page.picture(folder, 'kinds.png')
    yield "the menu of a card is whole", page.js(
        'const [card, menu] = [".card:has(details)", ".top .pop button"].map(css => document.querySelector('
        'css).getBoundingClientRect()); return menu.width > 80 && menu.right <= card.right')
    page.look(440, 1900, 'dark')
    page.picture(folder, 'kinds-dark.png')
    page.look(360, 740)
    for n, name in (2, '≡ 更多'), (3, '≡ 别的'):
        page.click('#menu summary', name)
        page.picture(folder, 'menu-%d.png' % n)
        yield 'the whole menu %d is seen' % n, page.js(
            'const box = document.querySelector("#menu [open] ul").getBoundingClientRect();'
            'return box.left >= 0 && box.right <= innerWidth')
        page.click('#menu summary', name)
    page.click('.passive:last-child .meta button')
    page.picture(folder, 'panel.png')
    yield 'the timeline is a page of its own', page.js('return document.querySelector("#panel").offsetWidth') == 360
    page.keys(Keys.ESCAPE)
    page.click('#people')
    page.picture(folder, 'people.png')
    page.click('#list .talk', '监控' if page.count('.talk', '监控') else 'bot.py')
    yield 'a chat is chosen, and seen', page.wait(
        lambda: page.js('return document.querySelector("#list").offsetWidth') == 0)
    page.look(1280, 800)


def talk(page, folder, bot, program):
    """The same with the 智能机器人 → (name, whether it went right)."""
    page.look(1280, 800)
    page.click('.talk', '小助手')
    yield 'who opens the chat is welcomed', page.heard('您好，我是小助手')
    page.say('备份怎么样')
    growing = 'return [...document.querySelectorAll(".growing")].map(node => node.innerText)'
    for name, sign in (('think', '思考中…'), ('thinking', '先看'), ('growing', '备份')):
        page.wait(lambda sign=sign: sign in ''.join(page.js(growing)))
        page.picture(folder, 'bot-%s.png' % name)
        if name == 'growing':
            page.look(760, 520)
            yield 'the picture of a stream is small', page.small_picture(folder, 'stream.png', 60)
            page.look(1280, 800)
        program.go.release()
    page.wait(lambda: page.count('.prose table') and not page.count('.growing'))
    yield 'a bubble grows and closes', [(b['frames'] > 3, b['finished']) for b in bot.bubbles[1:]] == [(True, True)]
    titles = [title for title, _ in page.steps()]
    yield 'its frames are in the timeline of what it answers: %s' % titles, titles == ['企业微信发给机器人'] + [
        '机器人发来 aibot_respond_msg', '企业微信的 ack'] * bot.bubbles[-1]['frames']
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
    page.choose('.card select', 'b')
    page.click('.acts button', '再试一次')
    page.wait(lambda: page.count('.acts button:disabled', '已经在备份'))
    pressed = program.next(Event='template_card_event')
    yield "a card's button and choice arrive", (pressed['EventKey'], pressed['SelectedItems']['SelectedItem']) == (
        'again', [{'QuestionKey': 'disk', 'OptionIds': {'OptionId': ['b']}}])
    page.click('#more')
    for name, kind in ('图片', 'image'), ('文件', 'file'):
        page.pick(name, os.path.join(folder, '照片.png'))
        page.heard('听到 ' + kind)
    page.picture(folder, 'bot-files.png')
    page.click('#more')
    kinds = [program.heard.get(timeout=5)['MsgType'] for _ in range(2)]
    yield 'a picture and a file go out', kinds == ['image', 'file']
    yield from group(page, folder, bot, program)
    page.choose('#fault', 'error')
    page.click('#do_fault')
    page.wait(lambda: page.count('#armed', '下一个 ack 是错误 6000'))
    page.say('@小助手 错')
    page.wait(lambda: any('6000' in note for note in page.texts('.note.bad')))
    yield 'a fault is asked for', not bot.faults.armed
    page.choose('#fault', 'close')
    page.click('#do_fault')
    page.wait(lambda: '还没有连上' in page.texts('#bot')[0])
    page.click('.talk', '监控')
    yield 'the app is what it was', page.count('.bubble') == 0 and page.count('#expire') == 1


def group(page, folder, bot, program):
    bot.say('lisi', '早', chat='group')
    yield 'what is unread is counted', page.has('.talk:has(.count)', '值班群') and page.wait(
        lambda: page.texts('.talk .count, #who .count') == ['2', '1', '2', '2'])
    page.click('.talk', '值班群')
    yield 'and read when it is opened', page.texts('.talk .count') == []
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


def lost(page, wecom):
    """The simulator stops and comes back: the text is kept, and the page says what happens."""
    port = int(wecom.url.rpartition(':')[2])
    page.js('document.querySelector("#text").focus()')
    page.keys('没有发出的字')
    kept = 'return document.querySelector("#text").value'
    wecom.stop()
    yield 'a simulator that stopped is seen', page.has('#banner', '断了')
    page.keys(Keys.ENTER)
    page.has('.note.bad', '没有发出去')
    yield 'what was not sent is kept', page.js(kept) == '没有发出的字'
    page.errors()                       # the browser says that nobody answers
    wecom.start(port=port)
    yield 'it comes back', page.has('.note.good', '又连上了')
    yield 'and the text is still there', page.js(kept) == '没有发出的字'
    next(event for event in wecom.events if event['kind'] == 'said')['at'] -= 86400
    wecom.run = 'another'               # as if it had been started again
    wecom.change()
    yield 'one that was started again, too', page.has('.note.good', '重新启动')
    page.click('.talk', '监控')
    yield 'after it was loaded again', page.js(kept) == '没有发出的字'
    page.click('.talk', '小助手')
    yield 'another day is another line', page.wait(lambda: page.count('#log .day') == 2)
    wecom.page_token = 'another'
    wecom.stop()
    wecom.start(port=port)
    yield 'one with another address, too', page.has('#banner', '地址不能用了')
    page.errors()


def looks(page, folder, prefix=''):
    for name, width, height in (('wide', 1920, 1080), ('', 1280, 800), ('middle', 900, 700), ('narrow', 360, 740)):
        for scheme in 'light', 'dark':
            page.look(width, height, scheme)
            page.picture(folder, '%s%s%s.png' % (prefix, name, scheme))
            yield '%s%s: nothing is cut off' % (prefix, name), page.fits(width)
    page.look(1280, 800)
    errors, hosts = page.errors(), page.hosts()
    yield 'no error on the console: %s' % errors, not errors
    yield 'no other host is asked: %s' % hosts, hosts == {'127.0.0.1'}


def readme(folder):
    """The pictures of the README, with examples/demo.py."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'examples', 'simulator.py'), os.path.join(
        ROOT, 'examples', 'demo.py'), '--port', '0'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    page = None
    try:
        page = Page(address(process))
        page.wait(lambda: '回调' in page.texts('#bot')[0], 20)
        page.look(1280, 780)
        page.say('你好')
        page.heard('你好（第 1 句）')
        page.say('菜单')
        page.heard('菜单建好了，点一下试试')
        page.say('按钮')
        page.wait(lambda: page.count('.acts button', '面条'))
        page.click('.acts button', '面条')
        page.has('.card', '今天吃面条')
        page.wait(lambda: page.count('#steps li') == 6)
        page.click('.me .meta button')
        yield 'the picture of the page is small', page.small_picture(folder, 'simulator.png', 100)
        page.click('#faults summary')
        page.look(1100, 720)
        yield 'the picture of the timeline is small', page.small_picture(folder, 'timeline.png', 60, '#panel')
    finally:
        if page:
            page.driver.quit()
        process.terminate()
        process.wait(20)


def address(process):
    """The page's address, which the simulator prints first."""
    return re.search(r'聊天页.*?(http\S+)', process.stdout.readline().decode()).group(1)


def run_talk(folder):
    """→ the checks of the 智能机器人."""
    wecom, page, done = simulator.WeCom(), None, []
    wecom.start()
    try:
        program = Talker(wecom.bot_settings)
        page = Page(wecom.page)
        done += talk(page, folder, wecom.bot, program)
        done += looks(page, folder, 'after-')
        done += lost(page, wecom)
    finally:
        if page:
            page.driver.quit()
        wecom.stop()
    return done + [('no problem for WeCom: %s' % wecom.bot.problems, not wecom.bot.problems)]


def run(folder):
    """→ the checks that failed, and how many there were."""
    with open(os.path.join(folder, '照片.png'), 'wb') as f:
        f.write(photo())
    with open(os.path.join(folder, 'bot.py'), 'w', encoding='utf-8') as f:
        f.write(BOT)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'examples', 'simulator.py'),
                                os.path.join(folder, 'bot.py'), ROOT], stdout=subprocess.PIPE)
    page, done = None, []
    try:
        page = Page(address(process))
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
    parser.add_argument('--keep', action='store_true', help='write the pictures of the README into examples/')
    parser.add_argument('folder', nargs='?', help='where the pictures go')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.abspath(args.folder or temporary)
        os.makedirs(folder, exist_ok=True)
        failures, total = run(folder)
        if args.keep:
            failures += [name for name, good in readme(folder) if not good]
            for name in 'simulator.png', 'timeline.png', 'stream.png':
                shutil.copyfile(os.path.join(folder, name), os.path.join(ROOT, 'examples', name))
    for name in failures:
        print('failed: ' + name)
    print('browser: %d passed, %d failed' % (total - len(failures), len(failures)))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
