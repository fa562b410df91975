"""A browser on the simulator's page: browser.py [--keep] [FOLDER]. Debian's chromium, headless, and a bot of its own.

It says 你好, sends a picture, presses a menu's button and a card's, waits for a callback of seven seconds and loses
answers; no error on the console, no request to another host. Pictures of the page, light, dark and 360 pixels wide, go
into FOLDER; --keep writes the one that the README shows, examples/simulator.png.
"""
import argparse
import base64
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import urllib.parse
import zlib

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
BOT = r'''
import sys, time
sys.path.insert(0, sys.argv[1])
import easywechat

CARD = {'card_type': 'button_interaction', 'source': {'desc': 'NAS'}, 'task_id': 'job-7', 'main_title': {
    'title': '备份失败', 'desc': '昨天 23:10'}, 'horizontal_content_list': [{'keyname': '磁盘', 'value': 'sda1 91%'},
    {'keyname': '负责人', 'type': 3, 'userid': 'lisi'}], 'button_list': [{'text': '再试一次', 'key': 'again'},
    {'text': '不管', 'style': 2, 'key': 'no'}]}


def text(msg):
    if msg['Content'] == '慢':
        time.sleep(7)
    if msg['Content'] == '备份好了吗':
        return {'msgtype': 'template_card', 'template_card': CARD}
    return msg['Content'] + '!'


server = easywechat.WeChatServer('demo')
server.client.call('menu/create', {'button': [{'type': 'click', 'name': '状态', 'key': 'status'}, {
    'name': '更多', 'sub_button': [{'type': 'click', 'name': '帮助', 'key': 'help'}]}]}, agentid=1000002)
server.register_callback('text', text)
server.register_callback('image', lambda msg: msg)
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
        self.wait(lambda: self.texts('#bot')[0].startswith('回调'))

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


def looks(page, folder):
    for name, width, height, scheme in (('light', 1000, 760, 'light'), ('dark', 1000, 760, 'dark'),
                                        ('narrow', 360, 740, 'light'), ('narrow-dark', 360, 740, 'dark')):
        page.look(width, height, scheme)
        page.picture(folder, name + '.png')
        yield '%s: no horizontal scrolling' % name, page.narrow()
    errors, hosts = page.errors(), page.hosts()
    yield 'no error on the console: %s' % errors, not errors
    yield 'no other host is asked: %s' % hosts, hosts == {'127.0.0.1'}


def run(folder):
    """→ the checks that failed, and how many there were."""
    with open(os.path.join(folder, '照片.png'), 'wb') as f:
        f.write(png(240, 135))
    with open(os.path.join(folder, 'bot.py'), 'w', encoding='utf-8') as f:
        f.write(BOT)
    simulator = subprocess.Popen([sys.executable, os.path.join(ROOT, 'examples', 'simulator.py'),
                                  os.path.join(folder, 'bot.py'), ROOT], stdout=subprocess.PIPE)
    page, done = None, []
    try:
        page = Page(re.search(r'聊天页: (\S+)', simulator.stdout.readline().decode()).group(1))
        for check in checks, looks:
            done += check(page, folder)
    finally:
        if page:
            page.driver.quit()
        simulator.terminate()
        done.append(('the simulator ends with 0', simulator.wait(20) == 0))
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
