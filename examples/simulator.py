#!/usr/bin/env python3
"""本机的企业微信:API 的那一半,和投递消息的那一半。给测试用,也给没有账号的人看看发出去的是什么。

    python examples/simulator.py            # 打印地址和要写进 config.ini 的设置,收到的消息一条一条打印

程序里::

    wecom = WeCom()
    url = wecom.start()                     # 端口由系统挑;easywechat 的 api_base 写它
    WeChatClient('demo', api_base=url, **wecom.settings).send('你好')
    wecom.messages[-1]['text']['content']   # 用户看到的
    wecom.script('message/send', {'errcode': -1, 'errmsg': 'system busy'}, 'lost')
                                            # 下面两次这样答;见 `WeCom.script`
    wecom.deliver('http://127.0.0.1:8000/weixin', Content='状态')     # 用户说了一句话
    wecom.inbox['zhangsan']                 # 他看到的,被动回复和主动发来的,依次

类型、限制、错误码照 path/90236(发消息)、90253(素材)、91770(群机器人)、91039 (gettoken)。
"""

import collections
import hashlib
import http.client
import http.server
import json
import os
import re
import socketserver
import sys
import threading
import time
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

from easywechat import WXBizMsgCrypt, dict_to_xml, xml_to_dict  # noqa: E402


class Refused(Exception):
    """企业微信的拒绝:``args`` 是 (errcode, errmsg)。"""


def need(condition, errcode, errmsg):
    """条件不成立就是这个错误。"""
    if not condition:
        raise Refused(errcode, errmsg)


def size(value):
    """UTF-8 的字节数;不是 str 的当作没有写。"""
    return len(value.encode('utf-8')) if isinstance(value, str) else 0


# ---- 消息的类型 (path/90236) -------------------------------------------------------------------
# 每个函数看一种类型:message[msgtype] 是 body,不合规矩就 Refused。

MEDIA = {'image': (10 << 20, ('.jpg', '.jpeg', '.png')), 'voice': (2 << 20, ('.amr',)),
         'video': (10 << 20, ('.mp4',)), 'file': (20 << 20, ())}


def check_text(wecom, body):
    need(size(body.get('content')), 44004, 'empty content')
    # 真的企业微信不报错,只是截断
    body['content'] = body['content'].encode('utf-8')[:2048].decode('utf-8', 'ignore')


def check_markdown(wecom, body):
    need(size(body.get('content')), 44004, 'empty content')
    need(size(body['content']) <= 2048, 45002, 'content size out of limit')


def check_media(kind):
    def check(wecom, body):
        media = wecom.media.get(body.get('media_id'))
        need(media and media['type'] == kind, 40007, 'invalid media_id')
        need(size(body.get('title')) <= 128 and size(body.get('description')) <= 512, 45002,
             'content size out of limit')
    return check


def check_url(url):
    need(size(url), 40035, 'missing url')
    need(re.match('[a-z]+://', url), 40094, 'url without scheme')
    need(size(url) <= 2048, 40039, 'invalid url size')


def check_textcard(wecom, body):
    need(size(body.get('title')), 41016, 'missing title')
    need(size(body.get('description')), 41033, 'missing description')
    need(size(body['title']) <= 128 and size(body['description']) <= 512, 45002,
         'content size out of limit')
    check_url(body.get('url'))


def check_articles(body):
    articles = body.get('articles')
    need(isinstance(articles, list) and articles, 44004, 'empty articles')
    need(len(articles) <= 8, 45008, 'article size out of limit')
    for article in articles:
        need(size(article.get('title')), 41016, 'missing title')
        need(size(article['title']) <= 128, 45002, 'title size out of limit')
    return articles


def check_news(wecom, body):
    for article in check_articles(body):
        need(size(article.get('description')) <= 512, 45002, 'description size out of limit')
        if not (article.get('appid') and article.get('pagepath')):
            check_url(article.get('url'))


def check_mpnews(wecom, body):
    for article in check_articles(body):
        need(article.get('thumb_media_id') in wecom.media, 40007, 'invalid thumb_media_id')
        need(size(article.get('content')), 44004, 'empty content')
        need(size(article.get('author')) <= 64, 45032, 'author size out of limit')


def check_miniprogram_notice(wecom, body):
    need(size(body.get('appid')), 90200, 'missing appid')
    need(4 <= len(body.get('title') or '') <= 12, 90200, 'invalid title')
    items = body.get('content_item') or []
    need(len(items) <= 10, 90201, 'too many items')
    for item in items:
        need(0 < len(item.get('key') or '') <= 10, 90202, 'invalid key')
        need(len(item.get('value') or '') <= 30, 90203, 'invalid value')


#: card_type → 必须有的字段和没有时的错误码。
CARDS = {
    'text_notice': [('card_action', 42045)],
    'news_notice': [('main_title', 42033), ('card_action', 42045)],
    'button_interaction': [('main_title', 42033), ('button_list', 42035), ('task_id', 42014)],
    'vote_interaction': [('main_title', 42033), ('checkbox', 42043), ('submit_button', 42046),
                         ('task_id', 42014)],
    'multiple_interaction': [('main_title', 42033), ('select_list', 42043),
                             ('submit_button', 42046), ('task_id', 42014)],
}


def check_template_card(wecom, body):
    need(body.get('card_type') in CARDS, 42031, 'invalid card_type')
    for field, errcode in CARDS[body['card_type']]:
        need(body.get(field), errcode, 'template_card.%s missing' % field)
    if body['card_type'] == 'text_notice':
        need((body.get('main_title') or {}).get('title') or body.get('sub_title_text'), 42033,
             'main_title.title or sub_title_text missing')
    if body['card_type'] == 'news_notice':
        need(body.get('card_image') or body.get('image_text_area'), 42044, 'card_image.url missing')
    task_id = body.get('task_id', 'x')
    need(re.fullmatch(r'[0-9A-Za-z_\-@]{1,128}', task_id), 42014, 'invalid task_id')
    buttons = body.get('button_list') or []
    need(len(buttons) <= 6, 42035, 'too many buttons')
    for button in buttons:
        need(button.get('text') and len(button['text']) <= 10, 42038, 'invalid button text')
        need(button.get('key') or button.get('url'), 42017, 'button key missing')


CHECKS = {'text': check_text, 'markdown': check_markdown, 'textcard': check_textcard,
          'news': check_news, 'mpnews': check_mpnews, 'template_card': check_template_card,
          'miniprogram_notice': check_miniprogram_notice}
CHECKS.update((kind, check_media(kind)) for kind in MEDIA)


# ---- 企业微信 ---------------------------------------------------------------------------------

class WeCom:
    """一个企业、一个应用、一个群机器人。类属性是企业微信的限制和脾气,测试可以改。"""

    #: token 活多少秒;不可信时别的 API 都答 60020;一分钟内给一个成员的,再多就悄悄丢掉;群机器人的是报错。
    token_life = 7200
    trusted = True
    per_member, per_robot = 30, 20
    #: 等回调几秒,一共投递几次;不是 200 的回答要不要再投递(文档前后不一)。
    patience, deliveries, retry_status = 5, 3, False

    def __init__(self):
        self.settings = {'corpid': 'wwsimulator0000001', 'agentid': '1000002', 'touser': 'zhangsan',
                         'secret': 'SimulatorSecretIsPublicDoNotUseItAnywhere00',
                         'robot': '00000000-0000-4000-8000-000000000000',
                         'token': 'SimulatorToken',
                         'encoding_aes_key': 'SimulatorKeyIsPublicDoNotUseItAnywhere00000'}
        self.users = {'zhangsan': '张三', 'lisi': '李四', 'wangwu': '王五'}
        self.messages = []          # 送到了的消息,依次
        self.robot_messages = []
        self.updates = []           # 更新过的卡片
        self.dropped = []           # 悄悄丢掉的
        self.inbox = collections.defaultdict(list)      # 成员 → 他看到的 (类型, 内容),依次
        self.calls = []             # 每次调用的路径
        self.media = {}             # media_id → {'type', 'name', 'data'}
        self.menu = None
        self._tokens = {}
        self._scripts = collections.defaultdict(list)
        self._times = collections.defaultdict(list)
        self._count = 0
        self._lock = threading.RLock()
        self._server = None

    def start(self, host='127.0.0.1', port=0):
        """开始服务,返回 api_base。"""
        server = type('Server', (socketserver.ThreadingMixIn, http.server.HTTPServer),
                      {'daemon_threads': True, 'request_queue_size': 128, 'wecom': self})
        self._server = server((host, port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return 'http://%s:%d' % self._server.server_address[:2]

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def script(self, path, *answers):
        """``path`` 的下面几次这样答,不照规矩:

        dict 是那个 JSON,消息不送到;bytes 是整个回答的原样字节;'lost' 送到了,却不答就关;'close' 没送到就关;
        'hang' 一直不答;'trickle' 一个字节一个字节没完没了;None 照规矩。
        """
        with self._lock:
            self._scripts[path] += answers

    def next_script(self, path):
        with self._lock:
            self.calls.append(path)
            return self._scripts[path].pop(0) if self._scripts[path] else None

    def expire_tokens(self):
        """发出去的 token 全部失效 (42001)。"""
        with self._lock:
            self._tokens = dict.fromkeys(self._tokens, 0)

    def _next(self, prefix):
        self._count += 1
        return '%s%d_%s' % (prefix, self._count, hashlib.sha1(os.urandom(8)).hexdigest()[:20])

    def answer(self, path, query, body, headers):
        """一次调用 → 回答 (dict,或下载的 (文件名, bytes))。"""
        with self._lock:
            try:
                method = getattr(self, 'api_' + path.replace('/', '_'), None)
                if method is None:
                    return None
                if path != 'gettoken' and not path.startswith('webhook/'):
                    self._check_token(query)
                answer = method(query, body, headers)
                return dict({'errcode': 0, 'errmsg': 'ok'}, **answer) \
                    if isinstance(answer, dict) else answer
            except Refused as e:
                return {'errcode': e.args[0], 'errmsg': '%s, hint: [%d_1_ab], from ip: 203.0.113.9, more '
                        'info at https://open.work.weixin.qq.com/devtool/query?e=%d'
                        % (e.args[1], time.time(), e.args[0])}

    def _check_token(self, query):
        need(self.trusted, 60020, 'not allow to access from your ip')
        token = query.get('access_token')
        need(token, 41001, 'access_token missing')
        need(token in self._tokens, 40014, 'invalid access_token')
        need(self._tokens[token] > time.monotonic(), 42001, 'access_token expired')

    def _json(self, body):
        try:
            need(not re.search(rb'\\u[0-9a-f]{4}', body), 40033, 'invalid charset: \\uxxxx')
            data = json.loads(body.decode('utf-8'))
            need(isinstance(data, dict), 40063, 'empty parameter')
            return data
        except ValueError:
            raise Refused(40063, 'Warning: wrong json format.') from None

    def api_gettoken(self, query, body, headers):
        need(query.get('corpid'), 41002, 'corpid missing')
        need(query.get('corpsecret'), 41004, 'corpsecret missing')
        need(query['corpid'] == self.settings['corpid'], 40013, 'invalid corpid')
        need(query['corpsecret'] == self.settings['secret'], 40001, 'invalid credential')
        token = self._next('token')
        self._tokens[token] = time.monotonic() + self.token_life
        return {'access_token': token, 'expires_in': self.token_life}

    def api_message_send(self, query, body, headers):
        message = self._json(body)
        need(isinstance(message.get('agentid'), int), 41011, 'missing agentid')
        need(str(message['agentid']) == self.settings['agentid'], 301002, 'not allow operate another agent')
        kind = message.get('msgtype')
        need(kind in CHECKS, 40008, 'invalid message type')
        need(isinstance(message.get(kind), dict), 40035, 'invalid parameter: %s' % kind)
        need(not (kind == 'news' and message.get('safe')), 40074, 'news can not be safe')
        CHECKS[kind](self, message[kind])
        return self._deliver(message)

    def _deliver(self, message):
        asked = [u for u in str(message.get('touser') or '').split('|') if u]
        groups = [g for key in ('toparty', 'totag') for g in str(message.get(key) or '').split('|') if g]
        need(asked or groups, 82001, 'user & party & tag all empty')
        need(len(asked) <= 1000, 40032, 'invalid userid list size')
        known = list(self.users) if '@all' in asked or groups else \
            [u for u in asked if u.lower() in self.users]
        need(known, 81013, 'user & party & tag all invalid')
        fresh = [u for u in known if self._counted('member ' + u) <= self.per_member]
        (self.messages if fresh else self.dropped).append(message)
        for user in fresh:
            kind = message['msgtype']
            self.inbox[user].append((kind, message[kind].get('content', message[kind])))
        return {'invaliduser': '|'.join(u.lower() for u in asked if u != '@all' and u.lower() not in self.users),
                'msgid': self._next('msg')}

    # 投递的那一半 (path/90238)

    def message(self, user='zhangsan', **fields):
        """用户发来的一条消息 (dict);没写的字段照常,事件没有 MsgId。"""
        with self._lock:
            self._count += 1
        full = {'ToUserName': self.settings['corpid'], 'FromUserName': user,
                'CreateTime': int(time.time()), 'MsgType': 'text', 'AgentID': self.settings['agentid']}
        full.update(fields)
        if full['MsgType'] != 'event':
            full.setdefault('MsgId', 7 * 10 ** 15 + self._count)
        return full

    def request(self, message):
        """一次投递的 (查询串, 正文 bytes);每次的 nonce 和密文都不同。"""
        crypt = WXBizMsgCrypt(*(self.settings[k] for k in ('token', 'encoding_aes_key', 'corpid')))
        encrypt = crypt.seal(dict_to_xml(message))
        now, nonce = str(int(time.time())), str(int.from_bytes(os.urandom(4), 'big'))
        query = urllib.parse.urlencode({'msg_signature': crypt.sign(now, nonce, encrypt),
                                        'timestamp': now, 'nonce': nonce})
        body = dict_to_xml({'ToUserName': self.settings['corpid'], 'Encrypt': encrypt.decode(),
                            'AgentID': self.settings['agentid']})
        return query, body.encode('utf-8')

    def opened(self, answer):
        """回答的信封 (bytes) → 里面的 dict;空的是 {}。"""
        if not answer:
            return {}
        crypt = WXBizMsgCrypt(*(self.settings[k] for k in ('token', 'encoding_aes_key', 'corpid')))
        envelope = xml_to_dict(answer)
        return xml_to_dict(crypt.decrypt_message(answer, envelope['MsgSignature'],
                                                 envelope['TimeStamp'], envelope['Nonce']))

    def ask(self, url, message):
        """投递一次,等 ``patience`` 秒 → (状态, 正文);连不上、等不到抛 `OSError` 或 `HTTPException`。"""
        parts = urllib.parse.urlsplit(url)
        query, body = self.request(message)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self.patience)
        try:
            connection.request('POST', parts.path + '?' + query, body, {'Content-Type': 'text/xml'})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def deliver(self, url, message=None, **fields):
        """像企业微信那样投递一条消息:等不到就断开、再投递,一共 ``deliveries`` 次 → 被动回复 (dict) 或 None。

        用户看到的记在 ``inbox``。
        """
        message = message or self.message(**fields)
        for _ in range(self.deliveries):
            try:
                status, answer = self.ask(url, message)
            except (OSError, http.client.HTTPException):
                continue
            if status != 200 and self.retry_status:
                continue
            reply = self.opened(answer) if status == 200 else {}
            if reply:
                with self._lock:
                    kind = reply['MsgType']
                    self.inbox[message['FromUserName']].append((kind, reply.get('Content', reply)))
            return reply
        return None

    def _counted(self, who):
        """最近一分钟里的第几条。"""
        now = time.monotonic()
        times = self._times[who] = [t for t in self._times[who] if t > now - 60] + [now]
        return len(times)

    def _file(self, body, headers):
        """multipart/form-data 里的那个文件 → (文件名, bytes)。"""
        boundary = re.search('boundary="?([^";]+)', headers.get('Content-Type', ''))
        need(boundary, 44001, 'empty media data')
        head, _, rest = body.partition(b'\r\n\r\n')
        name = re.search(b'name="media"; filename="([^"]*)"', head)
        data, end, _ = rest.rpartition(b'\r\n--' + boundary.group(1).encode() + b'--')
        need(name and end, 44001, 'empty media data')
        return name.group(1).decode('utf-8'), data

    def _upload(self, query, body, headers, kinds):
        kind = query.get('type')
        need(kind in kinds, 40004, 'invalid media type')
        name, data = self._file(body, headers)
        most, suffixes = MEDIA[kind]
        need(len(data) > 5, 44001, 'empty media data')
        need(len(data) <= most, 40006, 'invalid media size')
        need(not suffixes or name.lower().endswith(suffixes), 40005, 'invalid file type')
        media_id = self._next('media')
        self.media[media_id] = {'type': kind, 'name': name, 'data': data}
        return {'errmsg': '', 'type': kind, 'media_id': media_id, 'created_at': str(int(time.time()))}

    def api_media_upload(self, query, body, headers):
        return self._upload(query, body, headers, MEDIA)

    def api_media_get(self, query, body, headers):
        need(query.get('media_id') in self.media, 40007, 'invalid media_id')
        media = self.media[query['media_id']]
        return media['name'], media['data']

    def api_webhook_send(self, query, body, headers):
        need(query.get('key') == self.settings['robot'], 93000, 'invalid webhook url')
        message = self._json(body)
        kind = message.get('msgtype')
        content = message.get(kind) if isinstance(kind, str) else None
        need(kind in ('text', 'markdown', 'markdown_v2', 'image', 'news', 'file', 'voice',
                      'template_card') and isinstance(content, dict), 40008, 'invalid message type')
        if kind in ('text', 'markdown', 'markdown_v2'):
            need(size(content.get('content')), 44004, 'empty content')
            need(size(content['content']) <= (2048 if kind == 'text' else 4096), 45002,
                 'content size out of limit')
        elif kind == 'image':
            import base64
            data = base64.b64decode(content.get('base64', ''))
            need(len(data) <= 2 << 20, 40009, 'invalid image size')
            need(hashlib.md5(data).hexdigest() == content.get('md5'), 301019, 'media md5 not match')
        elif kind in ('file', 'voice'):
            need(content.get('media_id') in self.media, 40007, 'invalid media_id')
        elif kind == 'template_card':
            need(content.get('card_type') in ('text_notice', 'news_notice'), 42031, 'invalid card_type')
            check_template_card(self, content)
        else:
            check_news(self, content)
        need(self._counted('robot') <= self.per_robot, 45009, 'api freq out of limit')
        self.robot_messages.append(message)
        return {}

    def api_webhook_upload_media(self, query, body, headers):
        self._file(body, headers)
        need(query.get('key') == self.settings['robot'], 93000, 'invalid webhook url')
        return self._upload(query, body, headers, ('file', 'voice'))

    def _agent(self, query):
        need(query.get('agentid') == self.settings['agentid'], 40056, 'invalid agentid')

    def api_agent_get(self, query, body, headers):
        self._agent(query)
        return {'agentid': int(query['agentid']), 'name': '监控', 'close': 0,
                'allow_userinfos': {'user': [{'userid': u} for u in self.users]}}

    def api_user_get(self, query, body, headers):
        need(query.get('userid'), 41009, 'missing userid')
        need(query['userid'].lower() in self.users, 60111, 'userid not found')
        return {'userid': query['userid'], 'name': self.users[query['userid'].lower()], 'status': 1}

    def api_getcallbackip(self, query, body, headers):
        return {'ip_list': ['127.0.0.1']}

    def api_message_update_template_card(self, query, body, headers):
        update = self._json(body)
        need(update.get('response_code'), 40063, 'response_code missing')
        need(update['response_code'] not in [u['response_code'] for u in self.updates], 60140, 'response_code used')
        need(isinstance(update.get('button'), dict) or isinstance(update.get('template_card'), dict),
             40035, 'button or template_card missing')
        self.updates.append(update)
        return {}

    def api_menu_create(self, query, body, headers):
        self._agent(query)
        buttons = self._json(body).get('button')
        need(isinstance(buttons, list) and 1 <= len(buttons) <= 3, 40016, 'invalid button size')
        for button in buttons:
            need(0 < size(button.get('name')) <= 16, 40018, 'invalid button name size')
            subs = button.get('sub_button')
            need(subs is None or 1 <= len(subs) <= 5, 40023, 'invalid sub button size')
            for leaf in subs or [button]:
                need(leaf.get('type'), 40017, 'invalid button type')
                need(size(leaf.get('key') or leaf.get('url') or leaf.get('pagepath')), 40019,
                     'invalid button key size')
        self.menu = {'button': buttons}
        return {}

    def api_menu_get(self, query, body, headers):
        self._agent(query)
        need(self.menu, 46003, 'menu no exist')
        return self.menu

    def api_menu_delete(self, query, body, headers):
        self._agent(query)
        self.menu = None
        return {}


class Handler(http.server.BaseHTTPRequestHandler):
    """一次 API 调用;照 `WeCom.script` 捣乱。"""

    def log_message(self, *args):
        pass

    def do_GET(self):
        wecom = self.server.wecom
        parts = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        prefix, _, path = parts.path.rpartition('/cgi-bin/')
        script = wecom.next_script(path)
        if isinstance(script, bytes):
            self.wfile.write(script)
            return
        if script in ('close', 'hang', 'trickle'):
            self._never(script)
            return
        answer = script or wecom.answer(path, dict(urllib.parse.parse_qsl(parts.query)), body,
                                        self.headers)
        if isinstance(script, str):     # 'lost'
            wecom.answer(path, dict(urllib.parse.parse_qsl(parts.query)), body, self.headers)
        else:
            self._write(answer)

    do_POST = do_GET

    def _never(self, how):
        """没有答案:马上关、一直不答,或一个字节一个字节没完没了。"""
        try:
            if how == 'hang':
                self.rfile.read(1)      # 到对方关
            if how == 'trickle':
                self.wfile.write(b'HTTP/1.1 200 OK\r\nX: ')
                while True:
                    self.wfile.write(b'a')
                    time.sleep(0.05)
        except OSError:
            pass

    def _write(self, answer):
        if answer is None:
            self.send_error(404)
            return
        self.send_response(200)
        if isinstance(answer, tuple):
            name, data = answer
            self.send_header('Content-Type', 'application/octet-stream')
            self.send_header('Content-Disposition', 'attachment; filename="%s"'
                             % name.encode('utf-8').decode('latin-1'))
        else:
            data = json.dumps(answer, ensure_ascii=False).encode('utf-8')
            self.send_header('Content-Type', 'application/json; charset=UTF-8')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    wecom = WeCom()
    print('[demo]\napi_base = %s' % wecom.start('127.0.0.1', int(os.environ.get('PORT', 0))))
    for item in wecom.settings.items():
        print('%s = %s' % item)
    sys.stdout.flush()
    try:
        while True:
            time.sleep(0.2)
            for arrived in wecom.messages, wecom.robot_messages:
                while arrived:
                    print(json.dumps(arrived.pop(0), ensure_ascii=False), flush=True)
    except KeyboardInterrupt:
        pass


if __name__ == '__main__':
    main()
