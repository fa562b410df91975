#!/usr/bin/env python3
"""本机模拟器：一个文件，标准库。API、投递消息、聊天页都在里面。

    python examples/simulator.py examples/demo.py       # 启动机器人，打印聊天页的地址：在那里和它说话
    python examples/simulator.py --with nas examples/nas_monitor.py     # 自己 config.ini 的 [nas] 也给它
    python examples/simulator.py --json examples/demo.py        # 智能机器人不用长连接，用 JSON 回调
    python examples/simulator.py --port 9000 --url http://127.0.0.1:8000/weixin     # 机器人已经在别处运行
    python examples/simulator.py --port 9000 --url … --config config.ini    # 用它自己的密钥，只加 api_base 和 bot_url
    python examples/simulator.py            # 只有 API：打印要写进 config.ini 的设置，收到的消息一条一条打印

机器人的 easywechat 从一个临时的 config.ini 得到 api_base 和各个密钥，程序不用改一个字。自己的 config.ini 里，
只有 --with 说出的几节抄进去。机器人退出了，聊天页上有它的最后几行；改了它的文件（它、旁边的 .py、easywechat.py）就重新
启动，不要的话加 --no-reload，在聊天页上点「重新启动」。

程序里：

    wecom = WeCom()
    url = wecom.start()                     # 端口由系统挑；easywechat 的 api_base 写它
    WeChatClient('demo', api_base=url, **wecom.settings).send('你好')
    wecom.messages[-1]['text']['content']   # 用户看到的
    wecom.script('message/send', {'errcode': -1, 'errmsg': 'system busy'}, 'lost')
                                            # 下面两次这样答；见 `Api.script`
    wecom.deliver('http://127.0.0.1:8000/weixin', Content='状态')     # 用户说了一句话
    wecom.inbox['zhangsan']                 # 他看到的，被动回复和主动发来的，依次

智能机器人的长连接在 wecom.bot_settings 的 bot_url，它的一切在 ``wecom.bot``，见 `Bot`::

    WeChatServer('demo', api_base=url, **dict(wecom.settings, **wecom.bot_settings)).start()
    wecom.bot.wait(lambda bot: bot.connected)
    wecom.bot.say('zhangsan', '你好')       # 单聊；chat='group' 在群里 @ 它
    wecom.bot.wait(lambda bot: bot.bubbles and bot.bubbles[-1]['finished'])
    wecom.bot.bubbles[-1]['text']           # 用户看到的
    wecom.bot.fault('error', 6000)          # 下一个 ack 是这个错误；见 `Uplink.fault`

类型、限制、错误码照 path/90236（发消息）、94888（更新卡片）、90231（菜单）、90253（素材）、91770（群机器人）、
91039 (gettoken)、90313（错误码）。文档只给出一段号码的地方（卡片的 42014–42051），挑了意思最近的那个。
"""

import argparse
import base64
import collections
import contextlib
import hashlib
import heapq
import hmac
import http.server
import inspect
import itertools
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

from easywechat import (  # noqa: E402
    NetworkError, WeChatError, WXBizMsgCrypt, command, dict_to_xml, fetch, get_config, get_section, xml_to_dict)


class Refused(Exception):
    """企业微信的拒绝：``args`` 是 (errcode, errmsg)。"""


def need(condition, errcode, errmsg):
    """条件不成立就是这个错误。"""
    if not condition:
        raise Refused(errcode, errmsg)


def size(value):
    """UTF-8 的字节数；不是 str 的当作没有写。"""
    return len(value.encode('utf-8')) if isinstance(value, str) else 0


# ---- 消息的类型 (path/90236) -------------------------------------------------------------------
# 最多多长、几项，什么不能少，都在下面的表里，路径 (a.b.c) 穿过的列表看每一项；此外的规矩，一种类型一个函数，不合就
# Refused。``robot`` 是群机器人的 (path/91770)：它的素材是自己的，卡片的字少一些。

#: 类型 → {路径：（最多几个字，群机器人的若不同，错误码）}；列表自己的是项数。
TEXTS = {
    'textcard': {'btntxt': (4, 45002)}, 'news': {'articles': (8, 45008)}, 'mpnews': {'articles': (8, 45008)},
    'miniprogram_notice': {
        'title': (12, 90200), 'description': (12, 90200), 'content_item': (10, 90201), 'content_item.key': (10, 90202),
        'content_item.value': (30, 90203)},
    'template_card': {
        'source.desc': (20, 13, 45002), 'main_title.title': (36, 26, 42033), 'main_title.desc': (44, 30, 45002),
        'emphasis_content.title': (14, 10, 45002), 'emphasis_content.desc': (22, 15, 45002),
        'sub_title_text': (160, 112, 45002), 'action_menu.action_list': (3, 42047), 'jump_list': (3, 42037),
        'jump_list.title': (18, 13, 42033), 'horizontal_content_list': (6, 42036),
        'horizontal_content_list.keyname': (5, 42027), 'horizontal_content_list.value': (30, 26, 45002),
        'vertical_content_list': (4, 42047), 'vertical_content_list.title': (38, 42033),
        'vertical_content_list.desc': (160, 45002), 'button_list': (6, 42035), 'button_list.text': (10, 42038),
        'button_selection.option_list': (10, 42042), 'button_selection.option_list.text': (16, 42041),
        'checkbox.option_list': (20, 42042), 'checkbox.option_list.text': (17, 42041), 'select_list': (3, 42042),
        'select_list.option_list': (10, 42042), 'select_list.option_list.text': (16, 42041),
        'submit_button.text': (10, 42049)},
}
#: 同样的，量 UTF-8 的字节。
BYTES = {
    'text': {'content': (2048, 45002)}, 'markdown': {'content': (2048, 4096, 45002)},
    'markdown_v2': {'content': (4096, 45002)}, 'video': {'title': (128, 45002), 'description': (512, 45002)},
    'textcard': {'title': (128, 45002), 'description': (512, 45002), 'url': (2048, 40039)},
    'news': {'articles.title': (128, 45002), 'articles.description': (512, 45002), 'articles.url': (2048, 40039),
             'articles.pagepath': (128, 45002)},
    'mpnews': {'articles.title': (128, 45002), 'articles.digest': (512, 45002), 'articles.content': (666 << 10, 45002),
               'articles.author': (64, 45032)},
    'miniprogram_notice': {'page': (1024, 90204)},
    'template_card': {'button_list.key': (1024, 42017), 'action_menu.action_list.key': (1024, 42039),
                      'submit_button.key': (1024, 42046)},
}
#: 类型 → {路径：没有它的错误码}；路径上前面的没有，就不要。
NEEDED = {
    'text': {'content': 44004}, 'markdown': {'content': 44004}, 'markdown_v2': {'content': 44004},
    'textcard': {'title': 41016, 'description': 41033}, 'news': {'articles': 44004, 'articles.title': 41016},
    'mpnews': {'articles': 44004, 'articles.title': 41016, 'articles.content': 44004},
    'miniprogram_notice': {'appid': 90200, 'title': 90200, 'content_item.key': 90202},
    'template_card': {'horizontal_content_list.keyname': 42027, 'jump_list.title': 42033, 'button_list.text': 42038,
                      'action_menu.action_list.text': 42049, 'action_menu.action_list.key': 42039,
                      'submit_button.key': 42046},
}
#: 卡片上的选择题，都一样。
QUESTIONS = 'button_selection', 'checkbox', 'select_list'
for question in QUESTIONS:
    BYTES['template_card'].update({question + '.question_key': (1024, 42043),
                                   question + '.option_list.id': (128, 42040)})
    NEEDED['template_card'].update({question + '.question_key': 42043, question + '.option_list': 42042,
                                    question + '.option_list.id': 42040, question + '.option_list.text': 42041})


def flat(values):
    """列表换成它的各项。"""
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def found(body, path):
    """``path`` 上的每一个值。"""
    values = [body]
    for name in filter(None, path.split('.')):
        values = [value[name] for value in flat(values) if value.get(name) is not None]
    return values


def check_limits(kind, body, robot):
    for table, measure in (TEXTS, len), (BYTES, size):
        for path, row in table.get(kind, {}).items():
            for value in found(body, path):
                need(isinstance(value, list if path.endswith(('_list', 'articles', 'content_item')) else str), 40035,
                     '%s.%s has the wrong type' % (kind, path))
                need(measure(value) <= row[-2 if robot else 0], row[-1], '%s.%s size out of limit' % (kind, path))
    for path, errcode in NEEDED.get(kind, {}).items():
        parent, _, name = path.rpartition('.')
        need(all(one.get(name) for one in flat(found(body, parent))), errcode, 'missing %s.%s' % (kind, path))


def check_url(url):
    need(size(url), 40035, 'missing url')
    need(re.match('[a-z]+://', url), 40094, 'url without scheme')


MEDIA = {'image': (10 << 20, ('.jpg', '.jpeg', '.png')), 'voice': (2 << 20, ('.amr',)),
         'video': (10 << 20, ('.mp4',)), 'file': (20 << 20, ())}


def check_media_id(wecom, media_id, kind=None, owner='app'):
    media = wecom.media.get(media_id)
    need(media and media['owner'] == owner and kind in (None, media['type'])
         and time.time() < media['at'] + wecom.media_life, 40007, 'invalid media_id')


def check_media(kind):
    return lambda wecom, body, robot: check_media_id(wecom, body.get('media_id'), kind, 'robot' if robot else 'app')


def check_news(wecom, body, robot):
    for article in body['articles']:
        if not (article.get('appid') and article.get('pagepath')):
            check_url(article.get('url'))


def check_mpnews(wecom, body, robot):
    for article in body['articles']:
        check_media_id(wecom, article.get('thumb_media_id'))


def check_miniprogram_notice(wecom, body, robot):
    need(len(body['title']) >= 4, 90200, 'invalid title')
    need(len(body.get('description') or 'none') >= 4, 90200, 'invalid description')


# ---- 模板卡片 ---------------------------------------------------------------------------------
# 五种 (path/90236)；更新卡片的 (path/94888) 和群机器人的 (path/91770) 是同一个样子。

#: card_type → 必须有的字段和没有时的错误码。
CARDS = {
    'text_notice': [('card_action', 42045)],
    'news_notice': [('main_title', 42033), ('card_action', 42045)],
    'button_interaction': [('main_title', 42033), ('button_list', 42035)],
    'vote_interaction': [('main_title', 42033), ('checkbox', 42043), ('submit_button', 42046)],
    'multiple_interaction': [('main_title', 42033), ('select_list', 42043), ('submit_button', 42046)],
}
#: 点了要回调的几种：必须有 task_id，发出去时有 response_code。
INTERACTIVE = 'button_interaction', 'vote_interaction', 'multiple_interaction'


def check_target(target, errcode=42028, types='012'):
    """跳到哪里：``type`` 是 0 不跳，1 网址，2 小程序。"""
    kind = str(target.get('type', 0))
    need(kind in list(types), errcode, 'invalid type')
    if kind == '1':
        need(target.get('url'), errcode, 'url missing')
        need(re.match('[a-z]+://', target['url']), 42028, 'invalid url')
    if kind == '2':
        need(target.get('appid') and target.get('pagepath'), 42030 if errcode == 42028 else errcode,
             'appid or pagepath missing')


def check_lines(wecom, body):
    """按钮，卡片中间的几行，能点的区域，和下面的跳转。"""
    for button in body.get('button_list') or []:
        need(str(button.get('style', 1)) in list('1234'), 40035, 'invalid button style')
        if str(button.get('type', 0)) == '1':
            check_target(button)
        else:
            need(button.get('key'), 42017, 'button key missing')
    for line in body.get('horizontal_content_list') or []:
        kind = str(line.get('type', 0))
        if kind not in ('2', '3'):
            check_target(line, types='01')
        need(kind != '2' or line.get('media_id') in wecom.media, 42029, 'invalid media_id')
        need(kind != '3' or str(line.get('userid')).lower() in wecom.users, 42050, 'invalid userid')
    for area in flat(value for name in ('jump_list', 'quote_area', 'image_text_area') for value in found(body, name)):
        check_target(area)


def check_template_card(wecom, body, robot):
    """``task_id`` 不在这里看：更新的卡片不用写。"""
    kind, image = body.get('card_type'), body.get('card_image') or {}
    need(kind in CARDS and not (robot and kind in INTERACTIVE), 42031, 'invalid card_type')
    for field, errcode in CARDS[kind]:
        need(body.get(field), errcode, 'template_card.%s missing' % field)
    need((body.get('main_title') or {}).get('title')
         or kind == 'text_notice' and body.get('sub_title_text'), 42033, 'main_title.title missing')
    need(kind != 'news_notice' or image.get('url') or body.get('image_text_area') and not robot, 42044,
         'card_image.url missing')
    need(1.3 <= float(image.get('aspect_ratio') or 1.3) <= 2.25, 42044, 'invalid aspect_ratio')
    if body.get('card_action'):
        check_target(body['card_action'], 42045, '012' if kind in INTERACTIVE else '12')
    check_lines(wecom, body)
    questions = [found(one, 'option_list.id') for name in QUESTIONS for one in flat(found(body, name))]
    for keys, errcode in [(ids, 42040) for ids in questions] + [(found(body, 'action_menu.action_list.key'), 42051)]:
        need(len(set(keys)) == len(keys), errcode, 'duplicate id or key')


def check_task_id(body, used):
    """发出去的卡片：能点的要有 task_id，没有 ``used`` 过的。"""
    task_id = body.get('task_id')
    need(task_id or not (body['card_type'] in INTERACTIVE or body.get('action_menu')), 42014, 'task_id missing')
    need(not task_id or re.fullmatch(r'[0-9A-Za-z_\-@]{1,128}', task_id), 42014, 'invalid task_id')
    need(not task_id or task_id not in used, 42014, 'duplicate task_id')


CHECKS = {'text': None, 'markdown': None, 'markdown_v2': None, 'news': check_news, 'mpnews': check_mpnews,
          'textcard': lambda wecom, body, robot: check_url(body.get('url')), 'template_card': check_template_card,
          'miniprogram_notice': check_miniprogram_notice, **{kind: check_media(kind) for kind in MEDIA}}
#: 群机器人能发的。
ROBOT = 'text', 'markdown', 'markdown_v2', 'image', 'news', 'file', 'voice', 'template_card'


def check_body(wecom, kind, body, robot=False):
    """``kind`` 的正文合不合规矩。应用的文本太长不是错，企业微信截断。"""
    if kind == 'text' and not robot and size(body.get('content')):
        body['content'] = body['content'].encode('utf-8')[:2048].decode('utf-8', 'ignore')
    check_limits(kind, body, robot)
    if CHECKS[kind]:
        CHECKS[kind](wecom, body, robot)


#: safe 的时候能发的文件。
SAFE = tuple('.txt .pdf .doc .docx .ppt .pptx .xls .xlsx .xml .jpg .jpeg .png .bmp .gif'.split())


def check_message(wecom, message):
    """message/send 的正文以外的字段。"""
    kind, safe = message['msgtype'], message.get('safe', 0)
    need(safe in (0, 1, 2) and (safe != 2 or kind == 'mpnews'), 40035, 'invalid safe')
    need(not (kind == 'news' and safe), 40074, 'news can not be safe')
    if kind == 'file' and safe:
        need(wecom.media[message[kind]['media_id']]['name'].lower().endswith(SAFE), 40005, 'invalid file type')
    need(0 <= message.get('duplicate_check_interval', 1800) <= 14400, 40035, 'invalid duplicate_check_interval')
    need(kind != 'miniprogram_notice' or '@all' not in (message.get('touser') or '').lower(),
         40031, 'miniprogram_notice can not go to @all')
    if kind == 'template_card':
        card = message[kind]
        check_task_id(card, wecom.task_ids)
        need(wecom.has_callback or not (card['card_type'] in INTERACTIVE or card.get('action_menu')), 43012,
             'no callback url')


# ---- 成员发得出的 ------------------------------------------------------------------------------
# 企业微信在成员的手机、电脑上就不让发的；照素材的限制 (path/90253)。

NAMES = {'image': '图片', 'voice': '语音', 'video': '视频', 'file': '文件'}


def check_member(fields):
    """一条消息（XML 的名字，dict）。"""
    kind, text = fields.get('MsgType', 'text'), fields.get('Content')
    need(kind != 'text' or not isinstance(text, str) or text.strip(), 44004, '空的消息发不出去：写一点什么')
    need(kind != 'link' or re.match(r'https?://[^/\s]', fields.get('Url') or ''), 40039,
         '链接的网址不对：要以 http:// 或 https:// 开头')


def check_member_file(kind, name, data):
    need(kind in MEDIA, 40004, '没有这种消息')
    most, suffixes = MEDIA[kind]
    need(not suffixes or name.lower().endswith(suffixes), 40005, '%s只能是 %s，%s 作为文件发送' % (
        NAMES[kind], ' '.join(suffixes), name))
    need(len(data) >= 5, 40006, '%s 只有 %d 个字节，至少要 5 个' % (name, len(data)))
    need(len(data) <= most, 40006, '%s 有 %.1f MB，%s最多 %d MB' % (name, len(data) / 2 ** 20, NAMES[kind], most >> 20))


# ---- 菜单 (path/90231) ------------------------------------------------------------------------

BUTTONS = ('click', 'view', 'scancode_push', 'scancode_waitmsg', 'pic_sysphoto',
           'pic_photo_or_album', 'pic_weixin', 'location_select', 'view_miniprogram')


def check_menu_button(button, errcodes):
    """一个能点的按钮；``errcodes`` 是（类型，key, url）的错误码，一级和二级的不同。"""
    kind = button.get('type')
    need(kind in BUTTONS, errcodes[0], 'invalid button type')
    if kind == 'view':
        need(0 < size(button.get('url')) <= 1024, errcodes[2], 'invalid button url size')
        need(re.match('[a-z]+://', button['url']), 40055, 'invalid button url domain')
    elif kind == 'view_miniprogram':
        need(button.get('appid') and button.get('pagepath'), errcodes[2], 'appid or pagepath missing')
    else:
        need(0 < size(button.get('key')) <= 128, errcodes[1], 'invalid button key size')


def check_menu(buttons):
    need(isinstance(buttons, list) and 1 <= len(buttons) <= 3, 40016, 'invalid button size')
    for button in buttons:
        need(0 < size(button.get('name')) <= 16, 40018, 'invalid button name size')
        subs = button.get('sub_button')
        if not subs:
            check_menu_button(button, (40017, 40019, 40020))
            continue
        need(isinstance(subs, list) and len(subs) <= 5, 40023, 'invalid sub button size')
        for sub in subs:
            need(not sub.get('sub_button'), 40022, 'menu is too deep')
            need(0 < size(sub.get('name')) <= 40, 40025, 'invalid sub button name size')
            check_menu_button(sub, (40024, 40026, 40027))


# ---- 被动回复 (path/90241) --------------------------------------------------------------------

#: 类型 → 它的节点。
REPLIES = {'image': 'Image', 'voice': 'Voice', 'video': 'Video', 'update_button': 'Button',
           'update_template_card': 'TemplateCard'}
#: XML 的名字里不照规矩变成 JSON 的。
JSON_NAMES = {'pic_url': 'picurl', 'key_name': 'keyname', 'app_id': 'appid', 'user_id': 'userid',
              'page_path': 'pagepath', 'check_box': 'checkbox'}


def json_names(value):
    """XML 的 dict → JSON 的名字 (CamelCase → snake_case)；只有一项的列表还是列表。"""
    if isinstance(value, list):
        return [json_names(v) for v in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for name, inner in value.items():
        name = re.sub('(?<!^)(?=[A-Z])', '_', name).lower()
        name, inner = JSON_NAMES.get(name, name), json_names(inner)
        result[name] = [inner] if name.endswith('_list') and not isinstance(inner, list) else inner
    return result


#: 这些事件可以有被动回复。
ANSWERED = ('subscribe', 'enter_agent', 'LOCATION', 'click', 'view', 'view_miniprogram',
            'scancode_waitmsg', 'template_card_event', 'template_card_menu_event')


def reply_body(wecom, reply, event=None):
    """对 ``event``（消息是 None）的被动回复 (dict) → 正文，用主动发送的名字，不合规矩就 Refused。"""
    kind = reply.get('MsgType') or ''
    need(event is None or event in ANSWERED, 40008, 'the event %s takes no reply' % event)
    need(event != 'template_card_event' or kind.startswith('update_'), 40008,
         'the event %s takes updates only' % event)
    if kind == 'text':
        body = {'content': reply.get('Content')}
    elif kind == 'news':
        items = (reply.get('Articles') or {}).get('item') or []
        body = {'articles': json_names(items if isinstance(items, list) else [items])}
    else:
        body = json_names(reply.get(REPLIES.get(kind)))
        need(isinstance(body, dict), 40008, '%s is no passive reply' % kind)
    if kind != 'update_button':
        check_body(wecom, kind.replace('update_', ''), body)
    return body


# ---- 长连接的服务器一边 (RFC 6455) -------------------------------------------------------------
# 一条连接两条线程：HTTP 的那条收，自己的一条发。发的按时候排队，所以谁都不会等对方来读，晚到的 ack 也只是一个时候。

GUID = b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
MORE, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def masked(data, mask):
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, 'big') ^ int.from_bytes(key, 'big')).to_bytes(size, 'big')


def message_frame(opcode, data, final=True, mask=b''):
    """一帧 (bytes)；``mask`` 是四个字节就加掩码，服务器本来不加。"""
    size, flag = len(data), 0x80 if mask else 0
    length = bytes([flag | size]) if size < 126 else struct.pack('>BH', flag | 126, size) if size < 1 << 16 \
        else struct.pack('>BQ', flag | 127, size)
    return bytes([opcode | final << 7]) + length + mask + (masked(data, mask) if mask else data)


def in_fragments(data):
    """一条文字消息分成三片，切在字的中间也不管，片段之间有一个 ping。"""
    third = len(data) // 3
    return b''.join([message_frame(TEXT, data[:third], False), message_frame(MORE, data[third:2 * third], False),
                     message_frame(PING, b'between'), message_frame(MORE, data[2 * third:])])


class Broken(Exception):
    """对方不合 RFC 6455：``args`` 是（关闭码，为什么）。"""


class Connection:
    """机器人的程序连上来的一条；``number`` 是第几条，收到的消息交给 ``receive(self, str)``。"""
    most = 8 << 20      #: 一条消息最多多少字节。

    def __init__(self, number, sock, stream, receive):
        self.number, self._sock, self._stream, self._receive = number, sock, stream, receive
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.subscribed = self.deaf = self.masks = False    # masks：控制帧加掩码，像企业微信的网关
        self.waiting = set()            # ack 还没有发出去的 req_id
        self.over = threading.Event()
        self._queue, self._serial, self._rst, self._closing = [], 0, False, False
        self._ready = threading.Condition()

    def put(self, data, after=0, before=lambda: None):
        """排队：``after`` 秒以后发 ``data`` (bytes)，就在发之前调用 ``before()``。"""
        with self._ready:
            if not self._closing:
                self._serial += 1
                heapq.heappush(self._queue, (time.monotonic() + after, self._serial, data, before))
                self._ready.notify_all()

    def control(self, opcode, data=b'', masks=None):
        masks = self.masks if masks is None else masks
        self.put(message_frame(opcode, data, mask=os.urandom(4) if masks else b''))

    def close(self, code, reason=''):
        """说再见；对方一秒不理，就断开。"""
        self.control(CLOSE, struct.pack('>H', code) + reason.encode('utf-8')[:100])
        self._closing = True
        timer = threading.Timer(1, self.cut)
        timer.daemon = True
        timer.start()

    def cut(self, rst=False):
        """断开，不说再见；``rst`` 是 TCP 的 RST。在收的那条线程醒来，由它关。"""
        self._rst = self._rst or rst
        self.over.set()
        with self._ready:
            self._ready.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD if self._rst else socket.SHUT_RDWR)

    def serve(self):
        """收到断开为止。"""
        threading.Thread(target=self._write, daemon=True).start()
        try:
            self._read_all()
        except Broken as e:
            self.close(*e.args)
            self.over.wait(1)
        except (OSError, EOFError, ValueError):         # ValueError：流已经关了
            pass
        finally:
            self.cut()
            if self._rst:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                self._stream.close()
                self._sock.close()

    def _write(self):
        while not self.over.is_set():
            with self._ready:
                left = self._queue[0][0] - time.monotonic() if self._queue else 3600
                if left > 0:
                    self._ready.wait(left)
                    continue
                data, before = heapq.heappop(self._queue)[2:]
            try:
                before()
                self._sock.sendall(b'' if self.deaf else data)
            except OSError:
                self.cut()

    def _read(self, count):
        data = self._stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _frame(self):
        first, second = self._read(2)
        opcode, length = first & 15, second & 127
        if first & 0x70 or opcode not in (MORE, TEXT, BINARY, CLOSE, PING, PONG) or not second & 0x80 \
                or opcode >= CLOSE and (length > 125 or not first & 0x80):
            raise Broken(1002, 'not a frame of a client')
        if length > 125:
            length = int.from_bytes(self._read(2 if length == 126 else 8), 'big')
        if length > self.most:
            raise Broken(1009, 'too big')
        mask = self._read(4)
        return first >= 0x80, opcode, masked(self._read(length), mask)

    def _read_all(self):
        parts, kind = [], None
        while True:
            final, opcode, data = self._frame()
            if self.deaf:               # 半开：什么都不读、不答了
                self.over.wait()
                return
            if opcode == CLOSE:
                if not self._closing:
                    self.put(message_frame(CLOSE, data[:2]))
                    self.put(b'', before=self.cut)
                    self.over.wait(1)
                return
            if opcode == PING:
                self.control(PONG, data)
            if opcode in (PING, PONG):
                continue
            if (opcode == MORE) != (kind is not None) or sum(map(len, parts)) + len(data) > self.most:
                raise Broken(1002, 'a fragment out of place')
            kind = opcode if kind is None else kind
            parts.append(data)
            if final:
                try:
                    text = b''.join(parts).decode('utf-8')
                except UnicodeDecodeError:
                    raise Broken(1007, 'not UTF-8') from None
                parts, kind = [], None
                self._receive(self, text)


# ---- 智能机器人 (path/101463) -----------------------------------------------------------------
# 一间一间往上：`Chats` 是用户看到的和各种限制，`Uplink` 是长连接上的命令，`Callbacks` 是投递，`Bot` 是成员做的事。
# 旁边两间小的：`Faults` 是要捣的乱，`Uploads` 是分片上传。文档没有说的错误码：太长是 45002，写错的字段是 40058，
# 过了 5 秒的 req_id 是 846605。

#: 各条路上能发的类型。
ANSWERS = ('stream', 'stream_with_template_card', 'template_card', 'markdown') + tuple(MEDIA)
PUSHES = ('markdown', 'template_card') + tuple(MEDIA)
WELCOMES = 'text', 'template_card'
#: 长连接上的答复 → 对的是什么。
REPLY_TO = {'aibot_respond_msg': 'message', 'aibot_respond_welcome_msg': 'enter_chat',
            'aibot_respond_update_msg': 'template_card_event'}


def sealed(key, data):
    """素材的密文：AES-256-CBC，IV 是密钥的前 16 字节，PKCS#7 补到 32 的倍数。"""
    try:
        from Crypto.Cipher import AES
    except ImportError:                 # Debian 的名字
        from Cryptodome.Cipher import AES
    padding = 32 - len(data) % 32
    return AES.new(key, AES.MODE_CBC, key[:16]).encrypt(data + bytes([padding]) * padding)


class Chats:
    """机器人的会话：用户看到的气泡，和企业微信的限制。类属性是限制，测试可以改；`skip` 把钟往前拨。"""

    #: stream 和 markdown 的字节数，一个会话一分钟、一小时几条；stream 的后续几帧算不算。
    longest, per_minute, per_hour, frames_count = 20480, 30, 1000, False
    #: 多少秒以内：回复消息，欢迎语和更新卡片，一个 stream 的更新。
    reply_within, event_within, stream_life = 86400, 5, 360

    def __init__(self, corp):
        self.corp, self.mode = corp, 'ws'
        self.settings = {'bot_id': 'aib' + secrets.token_hex(16), 'bot_secret': secrets.token_urlsafe(32),
                         'bot_url': '', 'bot_name': '小助手'}
        self.group = 'wr' + secrets.token_hex(15)       # 群的 chatid
        self.groups = {self.group: {'name': '值班群', 'members': list(corp.users)}}
        self.bubbles = []       # 用户看到的，依次；见 `_bubble`
        self.problems = []      # 企业微信不认的，和用户看了会糊涂的，一条一句话
        self.met = set()        # 和机器人说过话的会话，只能主动发到这些
        self._times, self._tasks, self._later = collections.defaultdict(list), {}, 0

    @property
    def name(self):
        return self.settings['bot_name']

    def now(self):
        return time.monotonic() + self._later

    def skip(self, seconds):
        """这么多秒过去了：期限、频率照着算，不用等。"""
        self._later += seconds

    def wait(self, condition, seconds=5):
        """等到 ``condition(bot)`` 成立 → 它的值；``seconds`` 秒还不成立抛 `AssertionError`。"""
        with self.corp._changed:
            self.corp._changed.wait_for(lambda: condition(self), seconds)
            value = condition(self)
        if not value:
            raise AssertionError('not in %s seconds; problems: %s' % (seconds, self.problems))
        return value

    def _problem(self, chat, text, raw=None):
        self.problems.append(text)
        self.corp._log('note', chat=chat, text=text, **{'raw': raw} if raw else {})

    def _spend(self, who):
        """``who`` 又用了一次；太多了就 Refused。"""
        times = self._times[who] = [t for t in self._times[who] if t > self.now() - 3600]
        need(len(times) < self.per_hour and len([t for t in times if t > self.now() - 60]) < self.per_minute,
             45009, 'api freq out of limit')
        times.append(self.now())

    # 正文合不合规矩

    def _check(self, kind, body, update=False):
        need(isinstance(body, dict), 40058, 'invalid parameter: %s' % kind)
        feedback = body.get('feedback')
        need(feedback is None or 0 < size(feedback.get('id')) <= 256, 40058, 'invalid feedback.id size')
        if kind == 'stream':
            need(size(body.get('id')) and isinstance(body.get('finish', False), bool)
                 and isinstance(body.get('content', ''), str), 40058, 'invalid stream')
        if kind in ('stream', 'markdown'):
            need(size(body.get('content')) <= self.longest, 45002, '%s.content size out of limit' % kind)
        if kind in ('text', 'markdown'):
            need(size(body.get('content')), 44004, 'empty content')
        if kind in MEDIA:
            check_media_id(self.corp, body.get('media_id'), kind, 'bot')
        if kind in MEDIA or kind == 'template_card':
            check_limits(kind, body, True)
        if kind == 'template_card':
            self._check_card(body, update)

    def _check_card(self, card, update):
        """跳转多一种：3 是智能回复。更新的 text_notice 不写 card_action 也行 (§2.1)。"""
        jumps = card.get('jump_list') or []
        for jump in jumps:
            need(str(jump.get('type')) != '3' or 0 < size(jump.get('question')) <= 200, 42028, 'invalid jump question')
        shown = dict(card, jump_list=[jump for jump in jumps if str(jump.get('type')) != '3'])
        if update:
            shown.setdefault('card_action', {'type': 1, 'url': 'https://work.weixin.qq.com'})
        check_template_card(self.corp, shown, False)
        check_task_id(card, () if update else self._tasks)

    # 气泡

    def _bubble(self, chat, how, kind, body, raw, **more):
        """多一个气泡 → 它的 dict：

        chat（userid 或 chatid），how（reply、welcome、push、response），kind（消息的类型），text（能读的字），
        body（正文），finished，frames（几帧），feedback（它的 id），msgid（答的是哪一句），images，id（哪件事）。
        """
        text = body.get('content') or (body.get('main_title') or {}).get('title') or body.get('sub_title_text') or ''
        if kind in MEDIA:
            text = self.corp.media[body['media_id']]['name']
        feedback = (body.get('feedback') or {}).get('id')
        bubble = dict({'chat': chat, 'how': how, 'kind': kind, 'text': text, 'body': body, 'finished': True,
                       'frames': 1, 'feedback': feedback, 'msgid': None, 'images': []}, **more)
        self.bubbles.append(bubble)
        bubble['id'] = self.corp._log('bubble', chat=chat, how=how, type=kind, body=body, feedback=feedback, raw=raw,
                                      finished=bubble['finished'])['id']
        if kind == 'template_card' and body.get('task_id'):
            self._tasks[body['task_id']] = bubble
        return bubble

    def _show(self, chat, how, kind, body, raw, **more):
        self._check(kind, body)
        self._spend(chat)
        return self._bubble(chat, how, kind, body, raw, **more)

    def _answer(self, asked, message, raw):
        """对 ``asked``（用户的一句话，见 `Callbacks._deliver`）的一个回答。"""
        kind = message.get('msgtype')
        need(kind in ANSWERS, 40008, 'invalid message type')
        if kind[:6] == 'stream':
            card = message.get('template_card')
            if kind != 'stream' and card:
                need(not asked['card'], 40058, 'template_card was sent already')
                self._check('template_card', card)
            self._stream(asked, message.get('stream'), raw)
            if kind != 'stream' and card:
                asked['card'] = self._bubble(asked['chat'], 'reply', 'template_card', card, raw, msgid=asked['msgid'])
        else:
            self._show(asked['chat'], 'reply', kind, message.get(kind), raw, msgid=asked['msgid'])

    def _stream(self, asked, stream, raw):
        """一个 stream 的一帧：新的 id 是新的气泡，``content`` 每次都是全文。"""
        self._check('stream', stream)
        content, chat, images = stream.get('content', ''), asked['chat'], self._images(asked, stream, raw)
        bubble, begin = asked['streams'].get(stream['id'], (None, 0))
        if bubble is None:
            self._spend(chat)
            if any(not b['finished'] for b, _ in asked['streams'].values()):
                self._problem(chat, '上一个 stream 还没有 finish，就开始了下一个', raw)
            body = {'content': content, 'feedback': stream.get('feedback')}
            bubble = self._bubble(chat, 'reply', 'stream', body, raw, finished=False, msgid=asked['msgid'])
            asked['streams'][stream['id']] = bubble, self.now()
        else:
            need(self.now() < begin + self.stream_life and not bubble['finished'], 846608, 'stream update expired')
            if self.frames_count:
                self._spend(chat)
            bubble['frames'] += 1
        bubble['text'] = bubble['body']['content'] = content if content.strip() else bubble['text']
        bubble['finished'] = bool(stream.get('finish'))
        bubble['images'] += images
        self.corp._log('grow', of=bubble['id'], chat=chat, text=bubble['text'], finished=bubble['finished'], raw=raw)
        for data in images:
            media_id = self.corp.keep('image', 'image.' + ('png' if data[:1] == b'\x89' else 'jpg'), data, 'bot')
            self.corp._log('bubble', chat=chat, how='reply', type='image', body={'media_id': media_id}, finished=True,
                           raw=raw)
        if bubble['finished'] and not re.sub('<think>.*?(</think>|$)', '', bubble['text'], flags=re.S).strip():
            self._problem(chat, 'stream 结束了，气泡里没有看得见的字', raw)

    def _images(self, asked, stream, raw):
        """``msg_item`` → 图片 (bytes)：JSON 回调的最后一帧才能带。"""
        items, images = stream.get('msg_item') or [], []
        if items and (self.mode == 'ws' or not stream.get('finish')):
            self._problem(asked['chat'], 'msg_item 只能在 JSON 回调的最后一帧里，图片没有显示', raw)
            return []
        need(len(items) <= 10, 45008, 'msg_item size out of limit')
        for item in items:
            need(item.get('msgtype') == 'image', 40008, 'invalid msg_item')
            data = base64.b64decode(item['image']['base64'])
            need(hashlib.md5(data).hexdigest() == item['image'].get('md5'), 301019, 'media md5 not match')
            need(len(data) <= 10 << 20 and data.startswith((b'\xff\xd8', b'\x89PNG')), 40006, 'invalid image')
            images.append(data)
        return images

    def _update(self, asked, message, raw):
        """``template_card_event`` 的答复：点了的那张卡片换成新的。"""
        need(message.get('response_type') == 'update_template_card', 40058, 'invalid response_type')
        card = message.get('template_card')
        self._check('template_card', card, update=True)
        bubble = asked['card']
        need(card.get('task_id') in (None, bubble['body'].get('task_id')), 42014, 'task_id differs')
        self._spend(asked['chat'])
        users = message.get('userids') or []
        bubble.update(body=card, text=(card.get('main_title') or {}).get('title', ''), frames=bubble['frames'] + 1)
        self.corp._log('update', chat=asked['chat'], of=bubble['id'], users=users, body=card, raw=raw)

    def _reply(self, asked, message, raw):
        """对 ``asked`` 的答复：消息的、打开单聊的欢迎语、点了卡片的更新；别的事件没有。"""
        kind = message.get('msgtype')
        if asked['kind'] == 'message':
            self._answer(asked, message, raw)
        elif asked['kind'] == 'enter_chat':
            need(kind in WELCOMES, 40008, 'invalid message type')
            self._show(asked['chat'], 'welcome', kind, message.get(kind), raw)
        else:
            need(asked['kind'] == 'template_card_event', 40008, '%s 没有答复' % asked['kind'])
            self._update(asked, message, raw)


#: 故障 → 不写 ``value`` 时的值。马上就做的：
AT_ONCE = {'close': 1000, 'abort': None, 'half_open': None, 'kick': None, 'kick_open': None, 'unknown_cmd': None,
           'ping': None, 'masked_ping': None}
#: 记着的，下面 ``times`` 次用；最后两种一直到 `Bot.heal`。
ARMED = {'handshake': 503, 'refuse': 853000, 'error': 6000, 'no_ack': None, 'late_ack': 6, 'duplicate': None,
         'control': None, 'fragments': None, 'big': 1200000, 'no_pong': None, 'masked': None}
FOR_EVER = 'no_pong', 'masked'


class Faults:
    """记着的故障；``changed()`` 是有了变化。"""

    def __init__(self, changed):
        self.armed, self._changed = {}, changed         # 名字 → {'value', 'times', 'cmd'}

    def arm(self, name, value, times, cmd):
        value = ARMED[name] if value is None else value
        self.armed[name] = {'value': value, 'times': None if name in FOR_EVER else times, 'cmd': cmd}

    def take(self, name, cmd=None):
        """轮到它了 → 它的值（没有值的是 True），没有记着是 None。"""
        fault = self.armed.get(name)
        if not fault or fault['cmd'] not in (None, cmd):
            return None
        if fault['times']:
            fault['times'] -= 1
            if not fault['times']:
                del self.armed[name]
            self._changed()
        return True if fault['value'] is None else fault['value']


class Uploads:
    """分片上传 (§5)：片从 0 数起，什么顺序都行，可以重来；断线了还在。"""

    #: 一片、一个文件最多多少字节，最多几片，会话活多少秒。
    chunk, longest, chunks, life = 512 << 10, 50 << 20, 100, 1800

    def __init__(self, now, keep, next_id):
        self._now, self._keep, self._next, self._open = now, keep, next_id, {}

    def begin(self, body):
        """→ ack 的 body，下面两个也是。"""
        kind, name, total, chunks = (body.get(k) for k in ('type', 'filename', 'total_size', 'total_chunks'))
        need(kind in MEDIA, 40004, 'invalid media type')
        need(size(name) and isinstance(total, int) and isinstance(chunks, int), 40058, 'invalid parameter')
        need(name.lower().endswith(MEDIA[kind][1] or ''), 40005, 'invalid file type')
        most = self.longest if kind == 'file' else MEDIA[kind][0]
        need(5 <= total <= most and 1 <= chunks <= self.chunks and total <= chunks * self.chunk, 40006,
             'invalid media size')
        upload_id = self._next('upload')
        self._open[upload_id] = {'at': self._now(), 'parts': {}, 'asked': body, 'done': None}
        return {'upload_id': upload_id}

    def _upload(self, body):
        upload = self._open.get(body.get('upload_id'))
        need(upload and self._now() < upload['at'] + self.life, 40058, 'invalid upload_id')
        return upload

    def add(self, body):
        upload, index = self._upload(body), body.get('chunk_index')
        need(isinstance(index, int) and 0 <= index < upload['asked']['total_chunks'], 40058, 'invalid chunk_index')
        data = base64.b64decode(body['base64_data'], validate=True)
        need(0 < len(data) <= self.chunk, 40006, 'invalid chunk size')
        upload['parts'][index] = data

    def finish(self, body):
        upload = self._upload(body)
        asked, parts = upload['asked'], upload['parts']
        if not upload['done']:
            need(len(parts) == asked['total_chunks'], 40058, 'chunks missing')
            data = b''.join(parts[n] for n in sorted(parts))
            need(len(data) == asked['total_size'], 40006, 'invalid media size')
            need(asked.get('md5') in (None, '', hashlib.md5(data).hexdigest()), 301019, 'media md5 not match')
            media_id = self._keep(asked['type'], asked['filename'], data, 'bot')
            upload['done'] = {'type': asked['type'], 'media_id': media_id, 'created_at': str(int(time.time()))}
            parts.clear()
        return upload['done']


class Uplink(Chats):
    """长连接上的命令 (§2.1)：一帧进来，一个 ack 出去。"""

    #: 一分钟里能订阅几次；ack 在路上几秒（这段时间里同一个 req_id 又来一帧是 6000）。
    subscribes, ack_after = 30, 0.005

    def __init__(self, corp):
        super().__init__(corp)
        self.connections = []       # 连着的，订阅了的和没有的
        self.connected = None       # 订阅了的那一条 `Connection`
        self.frames = []            # 两个方向的每一帧：{'at', 'sender': 'bot' 或 'wecom', 'frame', 'connection'}
        self.faults = Faults(lambda: corp._log('changed'))
        self.uploads = Uploads(self.now, corp.keep, corp._next)
        self._asked = {}            # req_id → 问的是什么，见 `Callbacks._deliver`
        self._count = 0

    def connect(self, sock, stream):
        """一条升级了的连接，收到它断开为止。"""
        with self.corp._lock:
            self._count += 1
            connection = Connection(self._count, sock, stream, self._take)
            connection.masks = 'masked' in self.faults.armed
            self.connections.append(connection)
        try:
            connection.serve()
        finally:
            with self.corp._lock:
                self.connections.remove(connection)
                if self.connected is connection:
                    self.connected = None
                self.corp._log('changed')

    def _record(self, sender, connection, frame):
        body = frame.get('body')
        if isinstance(body, dict) and 'base64_data' in body:
            frame = dict(frame, body=dict(body, base64_data='(%d characters)' % len(str(body['base64_data']))))
        self.frames.append({'at': time.time(), 'sender': sender, 'connection': connection.number, 'frame': frame})
        del self.frames[:-10000]
        return json.dumps(frame, ensure_ascii=False)[:20000]

    def _send(self, connection, frame, after=0, before=lambda: None):
        shown = self._record('wecom', connection, frame)
        data = json.dumps(frame, ensure_ascii=False).encode('utf-8', 'replace')
        connection.put(message_frame(TEXT, data), after, before)
        return shown

    def _take(self, connection, text):
        """一帧 (str)：照规矩做，或者照 ``faults`` 出错，然后 ack。"""
        with self.corp._lock:
            try:
                frame = json.loads(text)
                cmd, req_id, body = frame.get('cmd'), frame['headers']['req_id'], frame.get('body', {})
                need(isinstance(req_id, str) and isinstance(cmd, str) and isinstance(body, dict), 40058, '')
            except (AttributeError, KeyError, TypeError, ValueError, Refused):
                return self._problem(None, '机器人发来一帧看不懂的：%s' % text[:200])
            said = self._asked.get(req_id, {}).get('said', {'at': time.time()})
            raw = [step('机器人发来 ' + cmd, self._record('bot', connection, frame), said)]
            busy, errcode, errmsg, more = req_id in connection.waiting, 0, 'ok', {}
            fault = None if cmd in ('ping', 'aibot_subscribe') else self.faults.take('error', cmd)
            try:
                need(not busy, 6000, 'data version conflict')
                need(fault is None, fault, 'as asked')
                more = self._command(connection, cmd, req_id, body, raw) or {}
            except Refused as e:
                errcode, errmsg = e.args
            except (AttributeError, KeyError, TypeError, ValueError):
                errcode, errmsg = 40058, 'invalid parameter'
            if errcode:
                self.corp._log('call', chat=self._chat_of(req_id, body), path=cmd, errcode=errcode, errmsg=errmsg,
                               raw=raw)
            ack = dict({'headers': {'req_id': req_id}}, **{'body': more} if more else {})
            raw += self._ack(connection, cmd, dict(ack, errcode=errcode, errmsg=errmsg), busy, said)

    def _ack(self, connection, cmd, ack, busy, said):
        """→ 原文的那一步，要是发了。"""
        self.corp._changed.notify_all()         # 等着的看一看
        lost = 'no_pong' if cmd == 'ping' else '' if cmd == 'aibot_subscribe' or busy else 'no_ack'
        if lost and self.faults.take(lost, cmd):
            return []
        req_id, after, before = ack['headers']['req_id'], 0, lambda: None
        if lost == 'no_ack':
            connection.waiting.add(req_id)
            after, before = (self.faults.take('late_ack', cmd) or self.ack_after,
                             lambda: connection.waiting.discard(req_id))
        return [['企业微信的 ack', self._send(connection, ack, after, before), time.time() + after - said['at']]]

    def _chat_of(self, req_id, body):
        return self._asked[req_id]['chat'] if req_id in self._asked else body.get('chatid')

    def _command(self, connection, cmd, req_id, body, raw):
        """→ ack 的 body，没有是 None。"""
        if cmd == 'aibot_subscribe':
            return self._subscribe(connection, body)
        need(connection.subscribed, 846609, 'aibot websocket not subscribed')
        if cmd in REPLY_TO:
            asked = self._asked.get(req_id)
            need(asked and asked['connection'] is connection and asked['kind'] == REPLY_TO[cmd] and self.now()
                 < asked['at'] + (self.reply_within if asked['kind'] == 'message' else self.event_within), 846605,
                 'invalid req_id')
            return self._reply(asked, body, raw)
        if cmd == 'aibot_send_msg':
            return self._push(body, raw)
        if cmd == 'aibot_upload_media_init':
            self._spend('uploads')
        uploads = self.uploads
        method = {'ping': lambda body: None, 'aibot_upload_media_init': uploads.begin,
                  'aibot_upload_media_chunk': uploads.add, 'aibot_upload_media_finish': uploads.finish}.get(cmd)
        need(method, 40058, 'invalid cmd')
        return method(body)

    def _subscribe(self, connection, body):
        times = self._times['subscribe'] = [t for t in self._times['subscribe'] if t > self.now() - 60] + [self.now()]
        need(not connection.subscribed and len(times) <= self.subscribes, 45009, 'api freq out of limit')
        refusal = self.faults.take('refuse')
        need(refusal is None, refusal, 'as asked')
        need(body.get('bot_id') == self.settings['bot_id'], 93019, 'invalid bot_id')
        need(self.mode == 'ws' and body.get('secret') == self.settings['bot_secret'], 853000, 'signature incorrect')
        if self.connected:
            self._kick(self.connected)
        connection.subscribed, self.connected = True, connection
        self.corp._log('changed')

    def _kick(self, connection, close=True):
        """别处用同一个 BotID 连上了。"""
        self._send(connection, {'cmd': 'aibot_event_callback', 'headers': {'req_id': self.corp._next('req')}, 'body': {
            'msgid': self.corp._next('msg'), 'create_time': int(time.time()), 'aibotid': self.settings['bot_id'],
            'msgtype': 'event', 'event': {'eventtype': 'disconnected_event'}}})
        connection.subscribed, self.connected = False, None
        if close:
            connection.close(1000)

    def _push(self, body, raw):
        kind, chat = body.get('msgtype'), body.get('chatid')
        need(kind in PUSHES, 40008, 'invalid message type')
        need(chat in self.met and body.get('chat_type', 0) in ((0, 2) if chat in self.groups else (0, 1)), 93006,
             'invalid chatid')
        self._show(chat, 'push', kind, body.get(kind), raw)

    def stop(self):
        for connection in list(self.connections):
            connection.cut()


class Callbacks(Uplink):
    """投递：``mode`` 是 'ws' 就到连着的那一条，'json' 就到 ``callback``（回调 URL，§6）。"""

    #: 多少秒：素材的网址，response_url，两次问 stream 之间。
    url_life, response_life, poll_every = 300, 3600, 1

    def __init__(self, corp):
        super().__init__(corp)
        self.callback = ''
        self.files = {}             # 名字 → {'name', 'data'（密文），'at'}：成员发来的素材
        self._codes, self._stopped = {}, threading.Event()

    def _served(self, name, data):
        """成员发来的素材加密了放着，5 分钟里能下载 → JSON；aeskey 末尾的 = 时有时无。"""
        key = base64.b64decode(self.corp.settings['encoding_aes_key'] + '=') if self.mode == 'json' else os.urandom(32)
        where = secrets.token_hex(16)
        self.files[where] = {'name': name, 'data': sealed(key, data), 'at': self.now()}
        shown = base64.b64encode(key).decode()
        more = {'aeskey': shown.rstrip('=') if len(self.files) % 2 else shown} if self.mode == 'ws' else {}
        return dict({'url': '%s/aibot/file/%s?sign=%s' % (self.corp.url, where, secrets.token_hex(8))}, **more)

    def _deliver(self, kind, body, chat, user, shown, card=None):
        """投递一句话或一个事件 → 那一帧。没有连上就丢了，企业微信不补。"""
        self.corp.listening(self.mode == 'ws' or self.callback)
        full = {'msgid': self.corp._next('msg'), 'aibotid': self.settings['bot_id'], 'from': {'userid': user}}
        if kind != 'enter_chat':        # §2.1 的例子没有
            full.update({'chatid': chat, 'chattype': 'group'} if chat in self.groups else {'chattype': 'single'})
        full.update({} if kind == 'message' else {'create_time': int(time.time())}, **body)
        asked = {'kind': kind, 'chat': chat, 'user': user, 'connection': self.connected, 'at': self.now(),
                 'msgid': full['msgid'], 'streams': {}, 'card': card}
        if self.mode == 'json' and kind in ('message', 'template_card_event'):
            code = self.corp._next('code')
            self._codes[code] = asked
            full['response_url'] = '%s/cgi-bin/aibot/response?response_code=%s' % (self.corp.url, code)
        big = kind == 'message' and self.faults.take('big')
        if big:
            full['quote'] = {'msgtype': 'text', 'text': {'content': 'x' * big}}
        frame = {'cmd': 'aibot_%s_callback' % ('msg' if kind == 'message' else 'event'),
                 'headers': {'req_id': self.corp._next('req')}, 'body': full}
        text = self._encoded(full if self.mode == 'json' else frame, full)
        what = {'items': shown, 'quote': self._quote_text(full), 'event': full.get('event')}
        raw = [['企业微信发给机器人', text[:20000], 0.0]] if self.mode == 'ws' else []
        asked['said'] = self.corp._log('said', chat=chat, user=user, raw=raw, body=what)
        self.corp.diary.expect(asked['said'], full['msgtype'], full['msgid'], full.get('event', {}).get('eventtype'))
        if self.mode == 'json':
            threading.Thread(target=self._call_back, args=(text, full, asked), daemon=True).start()
        elif self.connected:
            self._put(frame, text, asked)
            if self.faults.take('duplicate'):
                again = dict(frame, headers={'req_id': self.corp._next('req')})
                self._put(again, self._encoded(again, full), asked)
        else:
            self.corp._log('note', chat=chat, text='机器人没有连上，这一条它收不到了')
        return frame

    def _put(self, frame, text, asked):
        self._asked[frame['headers']['req_id']] = asked
        self._record('wecom', self.connected, frame)
        data = text.encode('utf-8', 'replace')
        self.connected.put(in_fragments(data) if self.faults.take('fragments') else message_frame(TEXT, data))

    def _encoded(self, message, body):
        """→ JSON；要出这个故障的时候，字符串里的控制字符不转义，没有的话加两个。"""
        if not self.faults.take('control'):
            return json.dumps(message, ensure_ascii=False)
        text = body.get('text')
        if text and not re.search('[\0-\x1f]', text['content']):
            text['content'] = '\x01%s\t' % text['content']
        return re.sub(r'\\(\\|"|u00[01][0-9a-f]|[bfnrt])', lambda found: found.group() if found.group(1) in '\\"'
                      else json.loads('"%s"' % found.group()), json.dumps(message, ensure_ascii=False))

    def _quote_text(self, body):
        quote = body.get('quote')
        return quote and (quote.get(quote['msgtype']) or {}).get('content', quote['msgtype'])[:200]

    def verify(self, url):
        """像后台的「保存」那样校验回调 URL → 哪里不对，'' 是通过。"""
        problem = self.corp._verify(url, corpid='')
        if not problem:
            self.callback = url
            self.corp._log('changed')
        return problem

    def _wrapped(self, text):
        query, encrypt = self.corp._signed(text, corpid='')
        return urllib.parse.urlencode(query), json.dumps({'encrypt': encrypt}).encode()

    def _unwrapped(self, answer, query):
        """回答的信封 (bytes) →（明文，dict）；没有话说是 ('', {})。"""
        if answer.strip() in (b'', b'success'):
            return '', {}
        try:
            envelope = json.loads(answer.decode('utf-8'))
            nonce = dict(urllib.parse.parse_qsl(query))['nonce']
            need(envelope['nonce'] == nonce, 40058, '信封的 nonce 不是 URL 里的')
            inner = json.dumps({'encrypt': envelope['encrypt']})
            text = self.corp._crypt(corpid='').decrypt_message(inner, envelope['msgsignature'],
                                                               str(envelope['timestamp']), nonce)
            reply = json.loads(text)
            need(isinstance(reply, dict), 40058, '不是 JSON 的对象')
            return text, reply
        except (KeyError, TypeError, ValueError) as e:
            raise Refused(40058, '不是信封：%r' % e) from None

    def _call_back(self, text, body, asked):
        """投递到回调 URL：等不到就再来，同一个 msgid；答的是没有结束的 stream，就一秒问一次。"""
        deliveries = 1 if asked['kind'] == 'template_card_event' else self.corp.deliveries
        for n in range(1, deliveries + 1):
            reply, raw = self.corp._attempt(self.callback, text, self._wrapped, self._unwrapped, asked['said'], n,
                                            deliveries)
            if reply is not None:
                break
        else:
            return
        self._passive(asked, reply, raw)
        while True:
            unfinished = [name for name, (bubble, _) in asked['streams'].items() if not bubble['finished']]
            if not unfinished or self._stopped.wait(self.poll_every):
                return
            if self.now() > asked['at'] + self.stream_life:
                return self._problem(asked['chat'], 'stream 6 分钟没有结束')
            self._poll(unfinished[0], body, asked)

    def _poll(self, stream, body, asked):
        """问一次 stream 现在的全文：自己的 msgid，没有 response_url。"""
        poll = {k: v for k, v in body.items() if k in ('aibotid', 'chatid', 'chattype', 'from')}
        poll.update(msgid=self.corp._next('msg'), msgtype='stream', stream={'id': stream})
        text = json.dumps(poll, ensure_ascii=False)
        query, envelope = self._wrapped(text)
        raw = [step('企业微信问 stream 的全文（明文）', text, asked['said'])]
        try:
            status, answer = self.corp._exchange(self.callback, query, envelope, kind='application/json')
            need(status == 200, 40058, '答的是 %d' % status)
            opened, reply = self._unwrapped(answer, query)
            raw.append(step('解密后的回复', opened, asked['said']))
            need((reply.get('stream') or {}).get('id') == stream, 40058, '不是这个 stream')
        except (NetworkError, WeChatError, Refused, AttributeError) as e:
            self._problem(asked['chat'], '问 stream 没有好的回答：%s' % e.args[-1], raw)
        else:
            self._passive(asked, reply, raw)

    def _passive(self, asked, reply, raw):
        """对投递的回答到了用户那里；企业微信不认的是问题。"""
        with self.corp._lock:
            try:
                need(not reply or asked['kind'] != 'message' or reply.get('msgtype') in ANSWERS[:3], 40008,
                     '%s 不能回答消息' % reply.get('msgtype'))
                if reply:
                    self._reply(asked, reply, raw)
            except (Refused, AttributeError, KeyError, TypeError, ValueError) as e:
                self._problem(asked['chat'], '企业微信不认这个答复：%s' % e.args[-1], raw)

    def respond(self, code, body):
        """response_url：一小时里一次，markdown 或卡片，不加密。"""
        asked = self._codes.get(code)
        need(asked and self.now() < asked['at'] + self.response_life, 60140, 'invalid response_code')
        message = json.loads(body.decode('utf-8'))
        kind = message.get('msgtype')
        need(kind == 'markdown' or kind == 'template_card' and asked['chat'] not in self.groups, 40008,
             'invalid message type')
        raw = [step('机器人发到 response_url', body.decode('utf-8'), asked['said'])]
        self._show(asked['chat'], 'response', kind, message.get(kind), raw, msgid=asked['msgid'])
        del self._codes[code]
        return {}

    def start(self, url):
        self.settings['bot_url'] = url
        self._stopped.clear()

    def stop(self):
        self._stopped.set()
        super().stop()


class Bot(Callbacks):
    """一个智能机器人，和成员做的事：`say`、`enter`、`press`、`feedback`、`event`；出故障是 `fault`、`heal`。

    ``mode`` 是 'ws'（长连接）或 'json'（投递到 ``callback``，它的回调 URL）。做过的看 ``bubbles``、``frames``、
    ``problems``；等一件事用 `wait`，过期不用等，`skip`。
    """

    #: 事件的数据直接写在 event 里，不是 event.<eventtype> 里。
    flat_events = False

    def __init__(self, corp):
        super().__init__(corp)
        self._entered = set()       #（成员，哪一天）

    def state(self):
        """聊天页要知道的。"""
        return {'name': self.name, 'mode': self.mode, 'callback': self.callback, 'groups': self.groups,
                'connected': self.connected.number if self.connected else 0,
                'armed': {name: fault['value'] for name, fault in self.faults.armed.items()},
                'faults': dict(AT_ONCE, **ARMED)}

    def say(self, user='zhangsan', text=None, chat=None, quote=None, mention=True, **media):
        """``user`` 对机器人说一句 → 投递的那一帧 (dict)，机器人收不到是 None。

        ``chat`` 不写是单聊，'group' 或 chatid 是群；群里的文字前面加上 @名字，``mention=False`` 不加。不是 ``text``
        的：image、file、video（bytes 或（文件名，bytes）），voice（转写的文字），mixed（[文字，图片或（名字，bytes），
        …]）。``quote`` 是引用的：一句话、一个气泡，或正文的 dict。
        """
        (kind, value), = dict(media, **{'text': text} if text is not None else {}).items()
        need(kind in ('text', 'voice', 'mixed') + tuple(MEDIA), 40008, '没有这种消息')
        group = self.groups.get(self.group if chat == 'group' else chat)
        need(group or chat in (None, user), 93006, '没有这个会话')
        chat = (self.group if chat == 'group' else chat) if group else user
        need(user in (group['members'] if group else self.corp.users), 40031, '没有这个成员')
        parts = value if kind == 'mixed' else [value]
        if group and kind in ('text', 'image', 'mixed'):
            parts = self._mentioned(parts) if mention else parts
            kind = 'mixed' if kind == 'image' and mention else kind
        with self.corp._lock:
            items = [self._item(part, kind) for part in parts]
            body = {'msgtype': kind, kind: {'msg_item': items} if kind == 'mixed' else items[0][items[0]['msgtype']]}
            shown = [item.pop('shown') for item in items]
            if quote is not None:
                body['quote'] = self._quoted(quote)
            words = ''.join(item['body'].get('content', '') for item in shown)
            if not group or kind in ('text', 'mixed') and '@' + self.name in words:
                self.met.add(chat)
                return self._deliver('message', body, chat, user, shown)
            self.corp._log('said', chat=chat, user=user, body={'items': shown, 'quote': self._quote_text(body)})
            self.corp._log('note', chat=chat, text='没有 @%s，机器人收不到' % self.name)
            return None

    def _mentioned(self, parts):
        """群里的几部分，第一段文字写着 @名字。"""
        at = '@' + self.name
        if any(isinstance(part, str) and at in part for part in parts):
            return parts
        return ['%s %s' % (at, parts[0])] + parts[1:] if isinstance(parts[0], str) else [at] + parts

    def _item(self, value, kind):
        """消息的一部分 → JSON；``shown`` 是聊天页画的。"""
        if isinstance(value, str):
            kind = 'voice' if kind == 'voice' else 'text'
            return {'msgtype': kind, kind: {'content': value}, 'shown': {'type': kind, 'body': {'content': value}}}
        name, data = (None, value) if isinstance(value, bytes) else value
        if kind not in MEDIA:           # mixed
            kind = 'image' if name is None or name.lower().endswith(MEDIA['image'][1]) else 'file'
        name = name or {'image': 'image.png', 'video': 'video.mp4'}.get(kind, 'file.bin')
        shown = {'type': kind, 'body': {'media_id': self.corp.keep(kind, name, data, 'user')}}
        return {'msgtype': kind, kind: self._served(name, data), 'shown': shown}

    def _quoted(self, quote):
        if isinstance(quote, dict) and 'msgtype' in quote:
            return quote
        return {'msgtype': 'text', 'text': {'content': quote['text'] if isinstance(quote, dict) else quote}}

    def event(self, eventtype, user='zhangsan', chat=None, card=None, **data):
        """一个事件 → 投递的那一帧；``data`` 是它的数据，``card`` 是点了的那张卡片（气泡）。"""
        inner = dict({'eventtype': eventtype}, **data if self.flat_events else {eventtype: data} if data else {})
        body = {'msgtype': 'event', 'event': inner}
        chat = self.group if chat == 'group' else chat or user
        with self.corp._lock:
            return self._deliver(eventtype, body, chat, user, [], card)

    def enter(self, user='zhangsan'):
        """``user`` 打开单聊：每天第一次是 enter_chat → 那一帧，以后是 None。"""
        day = int(time.time() + 8 * 3600 + self._later) // 86400
        if (user, day) in self._entered:
            return None
        self._entered.add((user, day))
        return self.event('enter_chat', user)

    def _bubble_of(self, bubble):
        """气泡，或者它是哪件事 → 气泡。"""
        found = [b for b in self.bubbles if bubble in (b['id'], b)]
        need(found, 40058, '没有这个气泡')
        return found[0]

    def press(self, bubble, key, user='zhangsan', selected=None):
        """点卡片（气泡或它的 id）上的按钮 → 那一帧；``selected`` 是 {question_key: [option_id, …]}。"""
        bubble = self._bubble_of(bubble)
        need(bubble['kind'] == 'template_card', 40058, '这不是卡片')
        card = bubble['body']
        items = [{'question_key': question, 'option_ids': {'option_id': list(ids)}}
                 for question, ids in (selected or {}).items()]
        more = {'selected_items': {'selected_item': items}} if items else {}
        return self.event('template_card_event', user, bubble['chat'], bubble, card_type=card['card_type'],
                          event_key=key, task_id=card.get('task_id', ''), **more)

    def feedback(self, bubble, kind=1, content='', reasons=(), user='zhangsan'):
        """评价一个气泡：``kind`` 1 准确、2 不准确、3 取消 → 那一帧。"""
        bubble = self._bubble_of(bubble)
        need(bubble['feedback'], 40058, '这个气泡没有 feedback.id')
        more = {'content': content, 'inaccurate_reason_list': list(reasons)}
        return self.event('feedback_event', user, bubble['chat'], id=bubble['feedback'], type=kind,
                          **{name: value for name, value in more.items() if value})

    # 出故障

    def fault(self, name, value=None, times=1, cmd=None):
        """出一次故障。马上就做的：

        'close' 关（``value`` 是关闭码，照常 1000）；'abort' RST；'half_open' 这条连接从此不读、不答；'kick' 是
        disconnected_event，然后关，'kick_open' 不关；'unknown_cmd' 一个没有听说过的 cmd；'ping' 服务器的 ping，
        'masked_ping' 加掩码的。

        记着、下面 ``times`` 次用的：'handshake' 握手的回答是这个状态（照常 503）；'refuse' 订阅被拒绝（照常 853000）；
        'error' ack 是这个错误码（照常 6000），那一帧不算；'no_ack' 做了、不 ack；'late_ack' 晚这么多秒（照常 6）；
        'duplicate' 同一个 msgid 两次；'control' 字符串里有裸的控制字符；'fragments' 分片；'big' 投递的消息有这么多字节
        （照常 1200000）。'error'、'no_ack'、'late_ack' 不算 ping 和订阅，``cmd`` 是只算这一种。

        一直到 `heal` 的：'no_pong' ping 没有 ack；'masked' 控制帧加掩码，像企业微信的网关。
        """
        with self.corp._lock:
            if name in ARMED:
                self.faults.arm(name, value, times, cmd)
                self._mask()
            else:
                need(self.connected, 846609, '机器人没有连上')
                self._at_once(name, AT_ONCE[name] if value is None else value, self.connected)
            self.corp._log('changed')

    def _at_once(self, name, value, connection):
        if name == 'close':
            connection.close(value, 'as asked')
        elif name == 'abort':
            connection.cut(rst=True)
        elif name == 'half_open':
            connection.deaf = True
        elif name == 'unknown_cmd':
            req_id = self.corp._next('req')
            self._send(connection, {'cmd': 'aibot_who_knows', 'headers': {'req_id': req_id}, 'body': {}})
        elif name in ('ping', 'masked_ping'):
            connection.control(PING, b'alive?', masks=name == 'masked_ping')
        else:
            self._kick(connection, close=name == 'kick')

    def heal(self):
        """记着的故障都不要了。"""
        with self.corp._lock:
            self.faults.armed.clear()
            self._mask()
            self.corp._log('changed')

    def _mask(self):
        for connection in self.connections:
            connection.masks = 'masked' in self.faults.armed


# ---- 机器人的日志 ------------------------------------------------------------------------------
# 从这里启动的机器人，easywechat 的日志每条多写一行到 stderr，前面是一个标记 (`tap`)；`Diary` 把它们变成聊天页上的事。

def tap(mark):
    """在机器人的进程里，它的程序还没有开始：记下日志，连 DEBUG 的回调在内；它自己的日志照旧，别的什么也不变。"""
    import contextlib
    import json
    import logging
    import os
    import sys

    class Logger(logging.Logger):
        def isEnabledFor(self, level):      # noqa: N802
            return True

        def handle(self, record):
            if record.levelno >= logging.WARNING or 'callback' in str(record.msg):
                self.tell(record)
            if super().isEnabledFor(record.levelno):
                super().handle(record)

        def tell(self, record):
            with contextlib.suppress(Exception):        # 别人的参数：机器人自己的日志会说
                form, args = (record.msg, record.args) if isinstance(record.args, tuple) else (record.getMessage(), ())
                args = [arg if isinstance(arg, (int, float)) else str(arg)[-3000:] for arg in args]
                line = json.dumps([record.created, record.levelname, str(form), args], ensure_ascii=False)
                os.write(2, (mark + line + '\n').encode('utf-8', 'replace'))

    usual = logging.getLoggerClass()
    logging.setLoggerClass(Logger)
    logging.getLogger('easywechat')
    logging.setLoggerClass(usual)
    folder, _, rest = os.environ.pop('PYTHONPATH').partition(os.pathsep)
    os.environ.update({'PYTHONPATH': rest} if rest else {})
    sys.path[:] = [path for path in sys.path if path != folder]
    del sys.modules['sitecustomize']


def step(title, text, said):
    """原文的一步：``said`` 那件事以后多少秒。"""
    return [title, text, time.time() - said['at']]


class Diary:
    """机器人的日志 → 聊天页上的事：哪一句的回调开始、结束、出错了，没有回复，警告。"""

    def __init__(self, corp):
        self._corp, self._asked = corp, collections.deque(maxlen=100)       # 投递了的，见 expect
        self.refusal = ''           # 它上一次为什么拒绝了投递
        self._forms = {
            'no callback for %s %s from %s': self._nobody, 'callback %s begins on %s %s from %s': self._begin,
            'callback %s failed：回调出错了，%s 消息 %s，来自 %s%s': self._fail,
            'callback %s ended on %s %s from %s: %d results': self._end}

    def expect(self, said, kind, msgid, event):
        """投递了 ``said``（那件事），回调会为它开始。"""
        who = dict({key: said[key] for key in ('chat', 'user') if key in said}, of=said['id'])
        with self._corp._lock:
            self._asked.append({'said': said, 'who': who, 'kind': kind, 'user': said['user'], 'id': str(msgid or ''),
                                'event': event, 'name': None, 'failed': False, 'over': False})

    def forget(self, said):
        """不会有回调了。"""
        with self._corp._lock:
            for one in self._asked:
                one['over'] = one['over'] or one['said'] is said

    def heard(self, at, level, form, args):
        """日志的一条。"""
        with self._corp._lock:
            if form in self._forms:
                return self._forms[form](at, *args)
            try:
                text = form % tuple(args) if args else form
            except (TypeError, ValueError):         # 别人的格式
                text = '%s %s' % (form, args)
            text, _, more = text.partition('\n')
            if form.startswith('refused'):
                self.refusal = text
            about = [one['who'] for one in self._asked if one['id'] and one['id'] in args] or [{}]      # 有它的 MsgId
            self._corp._log('log', at=at, level=level, text=text, **dict({'more': more} if more else {}, **about[0]))

    def _find(self, **known):
        """回调还没有结束的，先来的一个；没有是 None。"""
        known['over'] = False
        return next((one for one in self._asked if all(one[key] == value for key, value in known.items())), None)

    def _step(self, one, at, what, **more):
        self._corp._log('step', at=at, of=one['who']['of'], what=what, name=one['name'], seconds=at - one['said']['at'],
                        **more)

    def _begin(self, at, name, kind, msgid, user):
        one = self._find(name=None, kind=kind, id=msgid, user=user)
        if one:
            one['name'] = name
            self._step(one, at, 'begin')

    def _end(self, at, name, kind, msgid, user, results):
        one = self._find(name=name, kind=kind, id=msgid, user=user)
        if one:
            self._step(one, at, 'end', results=results)
            if not results and not one['failed']:
                self._silent(one, '回调 %s 返回了 None' % name)
            one['over'] = True

    def _fail(self, at, name, kind, msgid, user, trace):
        """回调出错了，或者它给的东西发不出去。"""
        one = self._find(name=name, kind=kind, id=msgid, user=user)
        last = trace.rpartition('Traceback (most recent call last):')[2]
        error = (re.findall(r'\n    (\S.*)', last) or [last.strip()])[0]
        places = re.findall(r'\n      File "(?:[^"]*[/\\])?([^"/\\]+)", line ([0-9]+)', last)
        own = [place for place in places if place[0] != 'easywechat.py']
        where = '（%s 第 %s 行）' % own[-1] if own else ''
        more = {'more': trace.strip('\n'), 'user': user}
        if one:
            one['failed'] = True
            self._step(one, at, 'fail', text=error)
            more.update(one['who'])
        self._corp._log('log', at=at, level='ERROR', text='回调出错：%s%s' % (error, where), **more)

    def _nobody(self, at, kind, msgid, user):
        one = self._find(name=None, kind=kind, id=msgid, user=user)
        if one:
            self._silent(one, '没有登记 %s 的回调' % ('event:' + one['event'] if one['event'] else one['kind']))
            one['over'] = True

    def _silent(self, one, why):
        """没有回复，也没有主动发来什么。"""
        who, where = one['who'], 'chat' if 'chat' in one['who'] else 'user'
        since = itertools.takewhile(lambda event: event['id'] > who['of'], reversed(self._corp.events))
        if not any(event['kind'] in ('out', 'bubble', 'update') and event.get(where) == who[where] for event in since):
            self._corp._log('silent', text='没有回复：' + why, **who)


# ---- 企业 -------------------------------------------------------------------------------------
# 企业微信是五间，一间一间往上，下面的不知道有上面的：`Corp` 是成员和发生的事，`Api` 是应用的 API，`Sending` 是发消息，
# `Deliveries` 是投递，`WeCom` 加上 HTTP。发生的每件事记在 ``events`` 里，聊天页照着画。

class Corp:
    """一个企业、一个应用、一个群机器人、一个智能机器人 (``bot``)。类属性是企业微信的限制和脾气，测试可以改。"""

    #: token、素材、response_code 活多少秒；发出去多少秒以内可以撤回。
    token_life, media_life, code_life, recall_within = 7200, 3 * 86400, 86400, 86400
    #: 不可信时 gettoken 以外的 API 都答 60020；没有回调 URL 的应用不能发要回调的卡片。
    trusted, has_callback = True, True
    #: 一分钟内给一个成员的，再多就悄悄丢掉；群机器人的是报错。
    per_member, per_robot = 30, 20
    #: 等回调几秒，一共投递几次；校验回调 URL 等几秒，几秒以后再试。
    patience, deliveries, verify_within = 5, 3, 1
    #: 故障：每次投递路上多花几秒，每条消息的前几次响应丢失，用不一致的 Token 签名。
    delay, lost, wrong_token = 0, 0, False

    def __init__(self):
        # 密钥只有这一次用。机器人多半听着 0.0.0.0：写在这个文件里的人人知道，同一个网里的谁都能指使它
        self.settings = {'corpid': 'wwsimulator0000001', 'agentid': '1000002', 'touser': 'zhangsan',
                         'secret': secrets.token_urlsafe(32),
                         'robot': re.sub('(.{8})(.{4})(.{4})(.{4})', r'\1-\2-\3-\4-', secrets.token_hex(16)),
                         'token': secrets.token_hex(16), 'encoding_aes_key': secrets.token_hex(22)[:43]}
        self.users = {'zhangsan': '张三', 'lisi': '李四', 'wangwu': '王五'}
        self.name, self.url, self.callback, self.menu = '监控', '', '', None     # 应用的名字、api_base、回调 URL
        self.inbox = collections.defaultdict(list)      # 成员 → 他看到的（类型，内容），依次
        self.media = {}             # media_id → {'type', 'name', 'data', 'owner', 'at'}
        self.events = collections.deque(maxlen=2000)
        self.page_token = secrets.token_urlsafe(16)     # 聊天页的地址里的
        self.hosts = set()          # 除了本机的几个名字，API 还认的 Host，例如中转的
        self.run = '%x' % int.from_bytes(os.urandom(8), 'big')     # 换了一个，聊天页从头画
        self._serial = self._count = 0
        self._codes = {}            # response_code →（到什么时候，{成员：他的那张卡片是哪件事}）
        self._asked = {}            # 成员 → 他上一次说话的时候
        self._times = collections.defaultdict(list)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.diary, self.process = Diary(self), None    # process：从这里启动的机器人，`Keeper`
        self.bot = Bot(self)

    @property
    def bot_settings(self):
        """config.ini 里智能机器人的几个键；JSON 模式没有 bot_secret。"""
        names = ('bot_id', 'bot_name') if self.bot.mode == 'json' else ('bot_id', 'bot_secret', 'bot_url', 'bot_name')
        return {name: self.bot.settings[name] for name in names}

    def _log(self, kind, **fields):
        """记一件事 → 它的 dict；提到的素材，把文件名和大小带上。"""
        with self._changed:
            self._serial += 1
            event = dict({'at': time.time()}, **fields, id=self._serial, kind=kind, files={})
            shown = json.dumps([fields.get('body'), fields.get('message')])
            for media_id in re.findall('media[0-9]+_[0-9a-f]{20}', shown):
                if media_id in self.media:
                    media = self.media[media_id]
                    event['files'][media_id] = media['name'], len(media['data'])
            self.events.append(event)
            self._changed.notify_all()
        return event

    def events_after(self, last, seconds):
        """``last`` 以后的事；没有就至多等 ``seconds`` 秒。"""
        with self._changed:
            self._changed.wait_for(lambda: self._serial > last, seconds)
            return [e for e in self.events if e['id'] > last]

    def state(self):
        """聊天页一打开要知道的。"""
        names = 'users', 'name', 'callback', 'menu', 'delay', 'lost', 'wrong_token', 'trusted'
        return dict({name: getattr(self, name) for name in names}, kind='state', run=self.run, bot=self.bot.state(),
                    process=self.process and self.process.state())

    def change(self, **values):
        """改几个属性，并让聊天页知道。"""
        for name, value in values.items():
            setattr(self, name, value)
        self._log('changed')

    def _next(self, prefix):
        self._count += 1
        return '%s%d_%s' % (prefix, self._count, hashlib.sha1(os.urandom(8)).hexdigest()[:20])

    def listening(self, callback):
        """没有回调 URL 就 Refused。"""
        need(callback, 40057, self.process.why() if self.process else '还没有机器人：回调 URL 通过了校验才能投递')

    def _counted(self, who):
        """最近一分钟里的第几条。"""
        now = time.monotonic()
        times = self._times[who] = [t for t in self._times[who] if t > now - 60] + [now]
        return len(times)

    def keep(self, kind, name, data, owner='app'):
        """放一个素材 → media_id。"""
        media_id = self._next('media')
        self.media[media_id] = {'type': kind, 'name': name, 'data': data, 'owner': owner, 'at': time.time()}
        return media_id

    def _new_code(self, cards):
        """一个 response_code，能更新这些卡片一次。"""
        code = self._next('code')
        self._codes[code] = time.monotonic() + self.code_life, cards
        return code


# ---- API --------------------------------------------------------------------------------------
# 一次调用进来，一个回答出去 (`Api.answer`)。一个 API 一个方法，名字是它的路径。

class Api(Corp):
    """收调用、认 token、照 `script` 出错；应用、菜单、通讯录的 API。"""

    def __init__(self):
        super().__init__()
        self.parties, self.tags = {'1': '总公司', '2': '运维部'}, {'1': '值班'}     # 每个都有全部成员
        self.calls = []             # 每次调用的路径
        self._tokens, self._scripts = {}, collections.defaultdict(list)

    def script(self, path, *answers):
        """``path`` 的下面几次这样答，不照规矩：

        dict 是那个 JSON，消息不送到；bytes 是整个回答的原样字节；'lost' 送到了，却不答就关；'close' 没送到就关；
        'hang' 一直不答；'trickle' 一个字节一个字节没完没了；None 照规矩。
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

    def answer(self, path, query, body, headers):
        """一次调用 → 回答（dict，或下载的（文件名，bytes）），没有这个 API 是 None。"""
        with self._lock:
            before, begin = self._serial, time.time()
            method = getattr(self, 'api_' + path.replace('/', '_'), None)
            if method is None:
                return None
            try:
                if path != 'gettoken' and not path.startswith(('webhook/', 'aibot/')):
                    self._check_token(query)
                answer = method(query, body, headers)
            except Refused as e:
                answer = self._refusal(*e.args)
            except (AttributeError, TypeError, ValueError):     # 某个字段不是那个类型
                answer = self._refusal(40035, 'invalid parameter, Warning: wrong json format.')
            if isinstance(answer, dict):
                answer = dict({'errcode': 0, 'errmsg': 'ok'}, **answer)
                self._show_call(before, begin, path, body, answer)
            return answer

    def _refusal(self, errcode, errmsg):
        return {'errcode': errcode, 'errmsg': '%s, hint: [%d_1_ab], from ip: 203.0.113.9, more info '
                'at https://open.work.weixin.qq.com/devtool/query?e=%d' % (errmsg, time.time(), errcode)}

    def _show_call(self, before, begin, path, body, answer):
        """这次调用里发生的事都带上它的原文；被拒绝的本身也是一件事。"""
        if answer['errcode']:
            errmsg = answer['errmsg'].partition(', hint')[0]
            self._log('call', path=path, errcode=answer['errcode'], errmsg=errmsg)
        if self._serial > before:
            shown = b'(%d bytes)' % len(body) if b'\0' in body else body[:20000]
            raw = [['机器人调用 /cgi-bin/' + path, shown.decode('utf-8', 'replace'), 0.0],
                   ['企业微信的回答', json.dumps(answer, ensure_ascii=False), time.time() - begin]]
            for event in itertools.takewhile(lambda event: event['id'] > before, reversed(self.events)):
                event['raw'] = raw

    def _check_token(self, query):
        need(self.trusted, 60020, 'not allow to access from your ip')
        token = query.get('access_token')
        need(token, 41001, 'access_token missing')
        need(token in self._tokens, 40014, 'invalid access_token')
        need(self._tokens[token] > time.monotonic(), 42001, 'access_token expired')

    def _json(self, body):
        try:
            need(not re.search(rb'(?<!\\)(\\\\)*\\u[0-9A-Fa-f]{4}', body), 40033, 'invalid charset: \\uxxxx')
            data = json.loads(body.decode('utf-8'))
            need(isinstance(data, dict), 40063, 'empty parameter')
            return data
        except ValueError:
            raise Refused(40063, 'Warning: wrong json format.') from None

    def _check_agent(self, agentid):
        need(agentid is not None, 41011, 'missing agentid')
        need(isinstance(agentid, int), 40056, 'invalid agentid')
        need(str(agentid) == self.settings['agentid'], 301002, 'not allow operate another agent')

    def api_gettoken(self, query, body, headers):
        need(query.get('corpid'), 41002, 'corpid missing')
        need(query.get('corpsecret'), 41004, 'corpsecret missing')
        need(query['corpid'] == self.settings['corpid'], 40013, 'invalid corpid')
        need(query['corpsecret'] == self.settings['secret'], 40001, 'invalid credential')
        token = self._next('token')
        self._tokens[token] = time.monotonic() + self.token_life
        return {'access_token': token, 'expires_in': self.token_life}

    def _agent(self, query):
        agentid = query.get('agentid')
        self._check_agent(int(agentid) if re.fullmatch('[0-9]+', agentid or '') else agentid)

    def api_agent_get(self, query, body, headers):
        self._agent(query)
        return {'agentid': int(query['agentid']), 'name': self.name, 'close': 0,
                'allow_userinfos': {'user': [{'userid': u} for u in self.users]}}

    def api_menu_create(self, query, body, headers):
        self._agent(query)
        buttons = self._json(body).get('button')
        check_menu(buttons)
        self.change(menu={'button': buttons})
        return {}

    def api_menu_get(self, query, body, headers):
        self._agent(query)
        need(self.menu, 46003, 'menu no exist')
        return self.menu

    def api_menu_delete(self, query, body, headers):
        self._agent(query)
        self.change(menu=None)
        return {}

    def api_user_get(self, query, body, headers):
        need(query.get('userid'), 41009, 'missing userid')
        need(query['userid'].lower() in self.users, 60111, 'userid not found')
        return {'userid': query['userid'], 'name': self.users[query['userid'].lower()], 'status': 1,
                'department': [1], 'main_department': 1}

    def api_user_simplelist(self, query, body, headers):
        need(query.get('department_id') in self.parties, 60003, 'department not found')
        return {'userlist': [{'userid': u, 'name': name, 'department': [1]} for u, name in self.users.items()]}

    def api_getcallbackip(self, query, body, headers):
        return {'ip_list': ['127.0.0.1']}

    def api_aibot_response(self, query, body, headers):         # path/101138
        return self.bot.respond(query.get('response_code'), body)


# ---- 发消息 -----------------------------------------------------------------------------------
# 素材 (path/90253)，message/send、更新、撤回，和群机器人的 webhook (path/91770)。

class Sending(Api):
    """消息送到成员那里，或悄悄丢掉。"""

    def __init__(self):
        super().__init__()
        self.messages, self.robot_messages = [], []     # 送到了的消息，依次
        self.updates = []           # 更新过的卡片
        self.dropped = []           # 悄悄丢掉的
        self.task_ids = set()
        self._sent = {}             # msgid → 什么时候发的
        self._repeated = {}         # 查重复的消息 → 到什么时候

    def _file(self, body, headers, field=b'media'):
        """multipart/form-data 里的那个文件 →（文件名，bytes）。"""
        boundary = re.search('boundary="?([^";]+)', headers.get('Content-Type') or '')
        need(boundary, 44001, 'empty media data')
        head, _, rest = body.partition(b'\r\n\r\n')
        name = re.search(b'name="' + field + b'"; filename="([^"]*)"', head)
        data, tail, _ = rest.rpartition(b'\r\n--' + boundary.group(1).encode() + b'--')
        need(name and tail and len(data) > 5, 44001, 'empty media data')
        return name.group(1).decode('utf-8'), data

    def _upload(self, query, body, headers, kinds, owner='app'):
        kind = query.get('type')
        need(kind in kinds, 40004, 'invalid media type')
        name, data = self._file(body, headers)
        most, suffixes = MEDIA[kind]
        need(len(data) <= most, 40006, 'invalid media size')
        need(not suffixes or name.lower().endswith(suffixes), 40005, 'invalid file type')
        return {'errmsg': '', 'type': kind, 'media_id': self.keep(kind, name, data, owner),
                'created_at': str(int(time.time()))}

    def api_media_upload(self, query, body, headers):
        return self._upload(query, body, headers, MEDIA)

    def api_media_uploadimg(self, query, body, headers):
        name, data = self._file(body, headers, b'[^"]*')
        need(len(data) <= 2 << 20, 40009, 'invalid image size')
        need(name.lower().endswith(MEDIA['image'][1]), 40005, 'invalid file type')
        return {'url': '%s/media/%s' % (self.url, self.keep('image', name, data))}

    def api_media_get(self, query, body, headers):
        need(query.get('media_id'), 41006, 'missing media_id')
        check_media_id(self, query['media_id'])
        media = self.media[query['media_id']]
        return media['name'], media['data']

    def api_message_send(self, query, body, headers):
        message = self._json(body)
        self._check_agent(message.get('agentid'))
        kind = message.get('msgtype')
        need(kind in CHECKS and kind != 'markdown_v2', 40008, 'invalid message type')
        need(isinstance(message.get(kind), dict), 40035, 'invalid parameter: %s' % kind)
        check_body(self, kind, message[kind])
        check_message(self, message)
        users, wrong = self._receivers(message)
        return dict(wrong, **self._deliver(message, users))

    def _receivers(self, message):
        """→（收得到的成员，{'invaliduser': …} 等）。部门和标签里是全部成员。"""
        found, wrong, anybody = set(), {}, False
        for key, known, most, errcode in (('touser', self.users, 1000, 40032), ('toparty', self.parties, 100, 82002),
                                          ('totag', self.tags, 100, 82003)):
            need(isinstance(message.get(key) or '', str), 40031, 'invalid %s list' % key)
            asked = [i.lower() for i in (message.get(key) or '').split('|') if i]
            need(len(asked) <= most, errcode, 'invalid %s list size' % key)
            right = [i for i in asked if i in known or key + i == 'touser@all']
            everybody = right and (key != 'touser' or '@all' in right)
            found.update(self.users if everybody else right)
            wrong['invalid' + key[2:]] = '|'.join(i for i in asked if i not in right)
            anybody = anybody or asked
        need(anybody, 82001, 'user & party & tag all empty')
        need(found, 81013, 'user & party & tag all invalid')
        return [u for u in self.users if u in found], wrong

    def _why_dropped(self, message, user):
        """为什么 ``user`` 看不到这一条，'' 是看得到。"""
        now, checked = time.monotonic(), message.get('enable_duplicate_check')
        what = json.dumps([user, message[message['msgtype']]], sort_keys=True)
        if checked and self._repeated.get(what, 0) > now:
            return '和刚才的一样'
        if self._counted('member ' + user) > self.per_member:
            return '一分钟里超过 %d 条' % self.per_member
        if checked:
            self._repeated[what] = now + message.get('duplicate_check_interval', 1800)
        return ''

    def _deliver(self, message, users):
        kind, msgid = message['msgtype'], self._next('msg')
        self._sent[msgid], shown = time.time(), {}
        why = {user: self._why_dropped(message, user) for user in users}
        (self.dropped if all(why.values()) else self.messages).append(message)
        for user in users:
            if why[user]:
                self._log('note', user=user, text=why[user] + '，企业微信悄悄丢掉了')
                continue
            self.inbox[user].append((kind, message[kind].get('content', message[kind])))
            asked = self._asked.get(user)
            shown[user] = self._log('out', user=user, how='active', type=kind, body=message[kind],
                                    msgid=msgid, seconds=asked and time.monotonic() - asked)['id']
        if kind != 'template_card':
            return {'msgid': msgid}
        card = message[kind]
        self.task_ids.add(card.get('task_id'))
        if card['card_type'] not in INTERACTIVE and not card.get('action_menu'):
            return {'msgid': msgid}
        return {'msgid': msgid, 'response_code': self._new_code(shown)}

    def api_message_recall(self, query, body, headers):
        msgid = self._json(body).get('msgid')
        need(msgid, 40063, 'msgid missing')
        need(self._sent.get(msgid, 0) + self.recall_within > time.time(), 40058, 'invalid msgid')
        for event in [e for e in self.events if e.get('msgid') == msgid]:
            self._log('recall', user=event['user'], of=event['id'])
        return {}

    def api_message_update_template_card(self, query, body, headers):
        update = self._json(body)
        self._check_agent(update.get('agentid'))
        for key, most, errcode in (('userids', 1000, 40032), ('partyids', 100, 82002), ('tagids', 100, 82003)):
            need(isinstance(update.get(key, []), list), 40031, 'invalid %s' % key)
            need(len(update.get(key, [])) <= most, errcode, 'invalid %s size' % key)
        groups = update.get('partyids') or update.get('tagids') or update.get('atall')
        users = list(self.users) if groups else [u.lower() for u in update.get('userids') or []]
        need(users, 82001, 'user & party & tag all empty')
        need(update.get('response_code'), 40063, 'response_code missing')
        until, cards = self._codes.get(update['response_code'], (0, {}))
        need(until > time.monotonic(), 60140, 'invalid response_code')
        button, card = update.get('button'), update.get('template_card')
        need(isinstance(button, dict) or isinstance(card, dict), 40035, 'button or template_card missing')
        if card:
            check_body(self, 'template_card', card)
        else:
            need(size(button.get('replace_name')), 40063, 'button.replace_name missing')
        del self._codes[update['response_code']]
        self.updates.append(update)
        for user in users:
            self._log('update', user=user, of=cards.get(user), button=button, body=card)
        return {'invaliduser': [u for u in users if u not in self.users]}

    def api_webhook_send(self, query, body, headers):
        need(query.get('key') == self.settings['robot'], 93000, 'invalid webhook url')
        message = self._json(body)
        kind = message.get('msgtype')
        need(kind in ROBOT and isinstance(message.get(kind), dict), 40008, 'invalid message type')
        content = self._robot_image(message[kind]) if kind == 'image' else message[kind]
        check_body(self, kind, content, robot=True)
        need(self._counted('robot') <= self.per_robot, 45009, 'api freq out of limit')
        self.robot_messages.append(message)
        self._log('out', how='robot', type=kind, body=content)
        return {}

    def _robot_image(self, content):
        data = base64.b64decode(content.get('base64', ''))
        need(len(data) <= 2 << 20, 40009, 'invalid image size')
        need(hashlib.md5(data).hexdigest() == content.get('md5'), 301019, 'media md5 not match')
        return {'media_id': self.keep('image', 'image.png', data, 'robot')}

    def api_webhook_upload_media(self, query, body, headers):
        self._file(body, headers)
        need(query.get('key') == self.settings['robot'], 93000, 'invalid webhook url')
        return self._upload(query, body, headers, ('file', 'voice'), 'robot')


# ---- 投递 (path/90238) ------------------------------------------------------------------------
# 成员说的，加密、签名，送到回调 URL；等不到就断开、再投递；被动回复给成员看。

class Deliveries(Sending):
    """投递，和成员在聊天页上做的事。"""

    def message(self, user='zhangsan', **fields):
        """用户发来的一条消息 (dict)；没写的字段照常，事件没有 MsgId。"""
        with self._lock:
            self._count += 1
        full = {'ToUserName': self.settings['corpid'], 'FromUserName': user,
                'CreateTime': int(time.time()), 'MsgType': 'text', 'AgentID': self.settings['agentid']}
        full.update(fields)
        if full['MsgType'] != 'event':
            full.setdefault('MsgId', 7 * 10 ** 15 + self._count)
        return full

    def _crypt(self, **other):
        settings = dict(self.settings, **other)
        return WXBizMsgCrypt(*(settings[k] for k in ('token', 'encoding_aes_key', 'corpid')))

    def _signed(self, text, **other):
        """→（查询参数 dict, 密文 str）；每次的 nonce 和密文都不同。``other`` 是和 ``settings`` 不同的。"""
        crypt = self._crypt(**dict(other, token='wrong') if self.wrong_token else other)
        encrypt, now = crypt.seal(text), str(int(time.time()))
        nonce = str(int.from_bytes(os.urandom(4), 'big'))
        query = {'msg_signature': crypt.sign(now, nonce, encrypt), 'timestamp': now, 'nonce': nonce}
        return query, encrypt.decode()

    def request(self, message):
        """一次投递的（查询串，正文 bytes）。"""
        query, encrypt = self._signed(dict_to_xml(message))
        body = dict_to_xml({'ToUserName': self.settings['corpid'], 'Encrypt': encrypt,
                            'AgentID': self.settings['agentid']})
        return urllib.parse.urlencode(query), body.encode('utf-8')

    def _unwrapped(self, answer, query=None):
        """回答的信封 (bytes) →（里面的 XML, dict）；没有回复是 ('', {})。"""
        if answer in (b'', b'success'):
            return '', {}
        envelope = xml_to_dict(answer)
        text = self._crypt().decrypt_message(answer, envelope.get('MsgSignature'), envelope.get('TimeStamp'),
                                             envelope.get('Nonce'))
        return text, xml_to_dict(text) if text else {}

    def opened(self, answer):
        """回答的信封 (bytes) → 里面的 dict；空的是 {}。"""
        return self._unwrapped(answer)[1]

    def _exchange(self, url, query, body=None, seconds=None, kind='text/xml'):
        """一个请求，一共等 ``seconds`` 秒（照常是 ``patience``）→（状态，正文）。"""
        until = time.monotonic() + (seconds or self.patience)
        time.sleep(min(self.delay, seconds or self.patience))
        left = until - time.monotonic()
        if left <= 0:
            raise NetworkError(504, 'the network is too slow')
        with fetch('%s?%s' % (url, query), body, {'Content-Type': kind}, left, proxies={}) as answer:
            return answer.status, answer.read()

    def ask(self, url, message):
        """投递一次，等 ``patience`` 秒 →（状态，正文）；连不上、等不到抛 `NetworkError`。"""
        return self._exchange(url, *self.request(message))

    def verify(self, url):
        """像后台的「保存」那样校验回调 URL → 哪里不对，'' 是通过。"""
        problem = self._verify(url)
        if not problem:
            self.change(callback=url)
        return problem

    def _verify(self, url, **other):
        echo = str(int.from_bytes(os.urandom(8), 'big'))
        query, encrypt = self._signed(echo, **other)
        query['echostr'] = encrypt
        try:
            status, answer = self._exchange(url, urllib.parse.urlencode(query), seconds=self.verify_within)
        except (NetworkError, ValueError) as e:
            return '%s 没有响应：%s' % (url, e)
        if status == 403:
            with self._changed:         # 从这里启动的机器人，日志就要到了
                self._changed.wait_for(lambda: self.diary.refusal, self.process and 1 or 0)
            why = '它的日志：%s' % self.diary.refusal if self.diary.refusal else (
                '原因在它的日志里，找这几个词：signature differs 是 Token 不一致，bad padding 是 EncodingAESKey '
                '不一致，receive id differs 是 CorpID 不一致')
            return '%s 返回 403。%s' % (url, why)
        return '' if (status, answer) == (200, echo.encode()) else '%s 返回 %d，不是 echostr' % (url, status)

    def deliver(self, url, message=None, **fields):
        """像企业微信那样投递一条消息：等不到就断开、再投递，一共 ``deliveries`` 次 → 被动回复 (dict) 或 None。

        用户看到的记在 ``inbox``。
        """
        message = message or self.message(**fields)
        user = message['FromUserName']
        begin = self._asked[user] = time.monotonic()
        if message.get('ResponseCode'):
            self._codes.setdefault(message['ResponseCode'], (begin + self.code_life, {}))
        said = self._log('in', user=user, message=message)
        self.diary.expect(said, message['MsgType'], message.get('MsgId'), message.get('Event'))
        for n in range(1, self.deliveries + 1):
            reply, raw = self._attempt(url, dict_to_xml(message), lambda text: self.request(message), self._unwrapped,
                                       said, n, self.deliveries)
            if reply:
                self._passive(message, reply, raw, time.monotonic() - begin)
            if reply is not None:
                return reply
        return None

    def _attempt(self, url, plain, wrap, unwrap, said, n, deliveries):
        """``said`` 的第 ``n`` 次投递 →（回复 dict，再投递是 None；原文）。``wrap`` 装进信封，``unwrap`` 拆开。"""
        which = dict({'chat': said['chat']} if 'chat' in said else {}, of=said['id'], n=n)
        raw = [step('企业微信写好的明文', plain, said)]
        query, body = wrap(plain)
        raw.append(step('加密、签名后的请求', 'POST %s?%s\n\n%s' % (url, query, body.decode('utf-8')), said))
        self._log('attempt', **which)
        kind = 'application/json' if body[:1] == b'{' else 'text/xml'
        begin, status, reply, error, opened = time.monotonic(), 0, {}, '', ''
        try:
            status, answer = self._exchange(url, query, body, kind=kind)
            text = answer[:20000].decode('utf-8', 'replace')
            title = '机器人的回答（密文）' if text else '机器人的回答'
            raw.append(step(title, '%d\n\n%s' % (status, text), said))
            if n <= self.lost:
                raise NetworkError(504, 'the answer was lost')
            opened, reply = unwrap(answer, query) if status == 200 else ('', {})
            if opened:
                raw.append(step('解密后的回复', opened, said))
        except NetworkError as e:
            error = '响应丢失' if status else '连不上' if e.errcode == 503 else '没有响应'
            status = 0
        except (WeChatError, Refused) as e:
            error = '回答读不懂：%s' % (e.args[-1],)
        again = not status and n < deliveries
        if status not in (0, 200) or error == '连不上' and not again:
            self.diary.forget(said)
        self._log('answer', status=status, error=error, raw=raw, again=again, seconds=time.monotonic() - begin, **which)
        if status == 200 and not (opened or error or self.process) and said.get('message', {}).get('MsgId'):
            self._log('silent', of=said['id'], user=said['user'], text='没有被动回复')
        return reply if status else None, raw

    def _passive(self, message, reply, raw, seconds):
        """被动回复到了用户那里。"""
        user, kind = message['FromUserName'], reply.get('MsgType')
        with self._lock:
            try:
                body = reply_body(self, reply, message.get('Event'))
            except (Refused, AttributeError, TypeError, ValueError) as e:
                self._log('note', user=user, text='企业微信不认这个被动回复：%s' % e.args[-1], raw=raw)
                return
            self.inbox[user].append((kind, reply.get('Content', reply)))
            if not kind.startswith('update_'):
                self._log('out', user=user, how='passive', type=kind, body=body, seconds=seconds, raw=raw)
                return
            cards = self._codes.get(message.get('ResponseCode'), (0, {}))[1]
            self._log('update', user=user, of=cards.get(user), raw=raw,
                      **{'button' if kind == 'update_button' else 'body': body})

    def say(self, user, fields, card=None):
        """``user`` 发来一条消息，投递在自己的线程里；``card`` 是他点的那张卡片是哪件事。"""
        self.listening(self.callback)
        need(user in self.users, 40031, '没有这个成员')
        check_member(fields)
        message = self.message(user, **fields)
        if card:
            message['ResponseCode'] = self._new_code({user: card})
        dict_to_xml(message)            # 写不成 XML 的，现在就说
        threading.Thread(target=self.deliver, args=(self.callback, message), daemon=True).start()

    def send_file(self, user, kind, name, data):
        """``user`` 发来一个文件。"""
        check_member_file(kind, name, data)
        with self._lock:
            media_id = self.keep(kind, name, data)
        url = '%s/media/%s' % (self.url, media_id)
        more = {'image': {'PicUrl': url}, 'voice': {'Format': 'amr'},
                'video': {'ThumbMediaId': media_id}, 'file': {'FileName': name}}
        self.say(user, dict({'MsgType': kind, 'MediaId': media_id}, **more[kind]))


# ---- HTTP -------------------------------------------------------------------------------------
# 一个端口：/cgi-bin/ 是 API，其余是聊天页。别的网站的脚本不能借浏览器的手进来（Host 防 DNS 重绑定，Origin 防跨站的
# 请求），这台机器上别的用户也不能：聊天页的地址里有 token，API 要 secret，都只有这一次用。素材的名字猜不出来。
#
# 聊天页从 /events 得到发生的每件事，一件一个 JSON，都有 id、kind、at（什么时候）和 files（提到的素材）：
#
#   state                   现状；process 是从这里启动的机器人（`Keeper.state`），没有是 null
#   in、said                 成员对应用、对智能机器人（有 chat，会话）说的一句；下面的 of 是它的 id
#   attempt、answer          它的第 n 次投递，和结果
#   step                    它的回调 name：what 是 begin、end（results 条）、fail（text 是什么错误）；seconds 离它多久
#   silent                  它没有回复，text 说为什么
#   log                     机器人的日志：level 是 WARNING 或 ERROR，more 是 traceback；没有 user 的不是对哪个成员的
#   out、bubble、grow、update、recall    成员看到的；grow、update、recall 的 of 是那个气泡
#   call、note               被拒绝的 API 调用；别的要说的
#
# raw 是原文，一步一个 [标题，文字，离那一句（没有就是离开始）多少秒]，依次；step 照 seconds 插在中间，就是一条时间线。
# POST 的回答是 {}，或 {error: 一句话}：企业微信不收的，和做不到的；/restart 是重新启动机器人。

TYPES = {'.jpg': 'image/jpeg', '.jpeg': 'image/jpeg', '.png': 'image/png', '.mp4': 'video/mp4',
         '.webm': 'video/webm', '.mp3': 'audio/mpeg', '.wav': 'audio/wav', '.ogg': 'audio/ogg', '.m4a': 'audio/mp4'}


#: 聊天页 (bytes)。没有外部的资源，打开它，没有一个请求离开这台机器。
with open(os.path.splitext(os.path.abspath(__file__))[0] + '.html', 'rb') as page:
    PAGE = page.read()


def only(kind):
    """策略里的一条：只有页面里的那一段样式或脚本。"""
    text = re.search(b'<%s>(.*)</%s>' % (kind, kind), PAGE, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
    return "%s-src 'sha256-%s'" % (kind.decode(), digest)


POLICY = '; '.join(["default-src 'none'", "img-src 'self'", "media-src 'self'", "connect-src 'self'",
                    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
                    only(b'style'), only(b'script')])
LOOPBACK = re.compile(r'(127(\.[0-9]{1,3}){3}|localhost|\[::1\])(:[0-9]+)?')
#: 页面上的开关能改的属性。
SWITCHES = {'delay': float, 'lost': int, 'wrong_token': bool, 'trusted': bool}


class Answers(http.server.BaseHTTPRequestHandler):
    """回答的几种写法，和谁能进来。"""

    def log_message(self, *args):
        pass

    def _foreign(self, api):
        """是不是别的网站借浏览器的手来的。"""
        host, origin = self.headers.get('Host', ''), self.headers.get('Origin')
        if not LOOPBACK.fullmatch(host) and host not in self.server.wecom.hosts:
            return True
        if api:
            return origin is not None or 'Sec-Fetch-Site' in self.headers
        return origin not in (None, 'http://' + host)

    def _json(self, answer):
        self._write(200, 'application/json; charset=UTF-8', json.dumps(answer, ensure_ascii=False).encode('utf-8'))

    def _write(self, status, kind, data, *headers):
        self.send_response(status)
        for item in (('Content-Type', kind), ('Content-Length', str(len(data))),
                     ('X-Content-Type-Options', 'nosniff')) + headers:
            self.send_header(*item)
        self.end_headers()
        self.wfile.write(data)


class Page(Answers):
    """聊天页：它自己，/events，素材，和成员在上面做的事。"""

    def _page(self, what, path, query, body):
        if what == 'GET /' and path == '/':
            self._write(200, 'text/html; charset=utf-8', PAGE,
                        ('Content-Security-Policy', POLICY), ('Referrer-Policy', 'no-referrer'),
                        ('Cache-Control', 'no-store'))
        elif what == 'GET /events':
            self._events()
        elif what == 'GET /media' and path[7:] in self.server.wecom.media:
            self._media(self.server.wecom.media[path[7:]])
        elif what in ('POST /say', 'POST /file', 'POST /switch', 'POST /bot', 'POST /restart'):
            try:
                getattr(self, '_' + self.path[1:].partition('?')[0])(query, body)
                self._json({})
            except (Refused, WeChatError, KeyError, TypeError, ValueError) as e:
                self._json({'error': '%s' % (e.args[-1],)})
        else:
            self._write(204 if path == '/favicon.ico' else 404, 'text/plain', b'')

    def _say(self, query, body):
        asked = json.loads(body.decode('utf-8'))
        self.server.wecom.say(asked['user'], asked['message'], asked.get('card'))

    def _file(self, query, body):
        user, kind, name = query['user'], query['type'], query['name']
        if query.get('chat'):           # parse_qsl 丢掉空的
            check_member_file(kind, name, body)
            need(kind != 'voice', 40004, '智能机器人收到的语音是转写的文字：用工具栏里的「语音」')
            self.server.wecom.bot.say(user, chat=query['chat'], **{kind: (name, body)})
        else:
            self.server.wecom.send_file(user, kind, name, body)

    def _bot(self, query, body):
        asked = json.loads(body.decode('utf-8'))
        what = asked.pop('do')
        need(what in ('say', 'enter', 'press', 'feedback', 'event', 'fault', 'heal'), 40058, '没有这件事')
        if what == 'say' and 'text' in asked:
            check_member({'Content': asked['text']})
        getattr(self.server.wecom.bot, what)(**asked)

    def _restart(self, query, body):
        process = self.server.wecom.process
        need(process, 40057, '机器人不是从这里启动的：到启动它的终端里重新启动')
        process.restart()

    def _switch(self, query, body):
        asked = json.loads(body.decode('utf-8'))
        if asked.pop('expire', None):
            self.server.wecom.expire_tokens()
        self.server.wecom.change(**{name: SWITCHES[name](value) for name, value in asked.items()})

    def _media(self, media):
        """一个素材。不是图片、声音、视频的，只能下载：这里是页面自己的源。"""
        kind = TYPES.get(os.path.splitext(media['name'].lower())[1])
        how = 'inline' if kind else 'attachment'
        name = urllib.parse.quote(media['name'], safe='')
        self._write(200, kind or 'application/octet-stream', media['data'],
                    ('Content-Security-Policy', "default-src 'none'; sandbox"),
                    ('Content-Disposition', "%s; filename*=UTF-8''%s" % (how, name)))

    def _events(self):
        """Server-Sent Events：先是现状，然后每件事一个，断了从 Last-Event-ID 接着。"""
        wecom = self.server.wecom
        last = int(self.headers.get('Last-Event-ID') or 0)
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream; charset=utf-8')
        self.send_header('Cache-Control', 'no-store')
        self.end_headers()
        self.wfile.write(b'data: %s\n\n' % json.dumps(wecom.state()).encode())
        while not self.server.stopping:
            events = wecom.events_after(last, 15)
            for event in events:
                last = event['id']
                event = wecom.state() if event['kind'] == 'changed' else event
                self.wfile.write(b'id: %d\ndata: %s\n\n' % (last, json.dumps(event).encode()))
            self.wfile.write(b'' if events else b': still here\n\n')


class Handler(Page):
    """一个请求：API（照 `Api.script` 出故障），长连接，或聊天页。"""

    def do_GET(self):
        try:
            numbers = [self.headers.get(name) or '0' for name in ('Content-Length', 'Last-Event-ID')]
            # 代理收到的是整个网址
            path, _, query = re.sub('^http://[^/]*', '', self.path).partition('?')
            prefix, api, name = path.rpartition('/cgi-bin/')
            if not (path.startswith('/') and all(re.fullmatch('[0-9]{1,9}', n) for n in numbers)):
                self._write(400, 'text/plain', b'bad request\n')
            elif self._foreign(api):
                self._write(403, 'text/plain', b'only for this machine\n')
            elif path == '/aibot' or self.headers.get('Upgrade', '').lower() == 'websocket':
                self._web_socket(path)
            elif path.startswith('/aibot/file/'):
                self._file_of_a_member(path[len('/aibot/file/'):])
            else:
                query = dict(urllib.parse.parse_qsl(query))
                if not (api or path.startswith('/media/') or path == '/favicon.ico' or hmac.compare_digest(
                        query.pop('token', '').encode(), self.server.wecom.page_token.encode())):
                    return self._write(403, 'text/plain; charset=utf-8', '请打开启动时打印的地址\n'.encode())
                body = self.rfile.read(int(numbers[0]))
                if api:
                    self._api(name, query, body)
                else:
                    self._page(self.command + ' /' + path.split('/')[1], path, query, body)
        except ConnectionError:
            pass                        # 对方走了

    do_POST = do_GET

    def _web_socket(self, path):
        """智能机器人的长连接；不是它的路径、不是握手，就是一个普通的回答。"""
        key, bot = self.headers.get('Sec-WebSocket-Key', ''), self.server.wecom.bot
        fault = bot.faults.take('handshake')
        if path != '/aibot' or self.headers.get('Sec-WebSocket-Version') != '13' or not key or fault:
            return self._write(fault or (400 if path == '/aibot' else 404), 'text/plain', b'no WebSocket here\n')
        accept = base64.b64encode(hashlib.sha1(key.encode() + GUID).digest())
        self.wfile.write(b'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
                         b'Sec-WebSocket-Accept: %s\r\n\r\n' % accept)
        self.close_connection = True
        bot.connect(self.connection, self.rfile)

    def _file_of_a_member(self, where):
        """成员发给机器人的素材的密文。"""
        bot = self.server.wecom.bot
        file = bot.files.get(where)
        if not file or bot.now() > file['at'] + bot.url_life:
            return self._write(403 if file else 404, 'text/plain', b'no such file any more\n')
        self._write(200, 'application/octet-stream', file['data'], (
            'Content-Disposition', "attachment; filename*=UTF-8''%s" % urllib.parse.quote(file['name'], safe='')))

    def _api(self, path, query, body):
        wecom = self.server.wecom
        script = wecom.next_script(path)
        if isinstance(script, bytes):
            self.wfile.write(script)
        elif script in ('close', 'hang', 'trickle'):
            self._never(script)
        elif script == 'lost':
            wecom.answer(path, query, body, self.headers)
        else:
            answer = script or wecom.answer(path, query, body, self.headers)
            if answer is None:
                self.send_error(404)
            elif isinstance(answer, tuple):
                name, data = answer
                name = re.sub('[\\x00-\\x1f"]', '_', name).encode('utf-8').decode('latin-1')
                self._write(200, 'application/octet-stream', data,
                            ('Content-Disposition', 'attachment; filename="%s"' % name))
            else:
                self._json(answer)

    def _never(self, how):
        """没有答案：马上关、一直不答，或一个字节一个字节没完没了。"""
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


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 128
    stopping = False


class WeCom(Deliveries):
    """企业微信，带着 HTTP。"""

    _server = None

    def start(self, host='127.0.0.1', port=0):
        """开始服务，返回 api_base。"""
        self._server = Server((host, port), Handler)
        self._server.wecom = self
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = 'http://%s:%d' % self._server.server_address[:2]
        self.bot.start(self.url.replace('http', 'ws', 1) + '/aibot')
        return self.url

    @property
    def page(self):
        """聊天页的地址。"""
        return '%s/?token=%s' % (self.url, self.page_token)

    def stop(self):
        self._server.stopping = True
        self.bot.stop()
        self._log('changed')                # 等着的页面看见了就走
        self._server.shutdown()
        self._server.server_close()


# ---- 命令行 -----------------------------------------------------------------------------------
# 退出码：0 是被停下，2 是用法不对、端口用不了。机器人退出了，模拟器还在：聊天页上有它的最后几行。

def tell(text, stream=None):
    """打印一行；没有人读就算了。"""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def write_config(path, sections):
    """只有自己能读的 config.ini。"""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w', encoding='utf-8') as f:
        for name, values in sections.items():
            f.write('[%s]\n' % name)
            f.writelines('%s = %s\n' % (k, v.replace('\n', '\n ')) for k, v in values.items())


def child_environment(folder):
    """机器人的环境。EASYWECHAT_CONFIG 指着临时的配置：否则 easywechat 会找到用户真的 config.ini，把这里的话发给真的人；
    环境里的设置也不能漏进来。token 和程序自己的状态存在临时的目录里，用完就没有了。PYTHONPATH 里有 `tap`。
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith('EASYWECHAT_')}
    return dict(env, EASYWECHAT_CONFIG=os.path.join(folder, 'config.ini'), XDG_CACHE_HOME=folder, XDG_STATE_HOME=folder,
                PYTHONPATH=os.pathsep.join(filter(None, [folder, env.get('PYTHONPATH')])))


def callback_url(line):
    """`WeChatServer.run` 在 stderr 上说它在哪里听 (bytes) → 本机能用的 URL，别的行是 None。"""
    found = re.match(rb'EasyWeChat \S+ (http://[!-~]+)', line)
    url = found and found.group(1).decode()
    return url and url.replace('//0.0.0.0:', '//127.0.0.1:').replace('//[::]:', '//[::1]:')


class Host:
    """机器人在这里被校验：``url`` 是它的回调 URL，每秒一次，直到通过；同样的原因不说第二遍。"""

    def __init__(self, wecom, url=None):
        self.wecom, self.url, self._told, self._next = wecom, url, '', 0

    def introduce(self):
        """通过了校验，或者还没有到时候，什么也不做。"""
        wecom = self.wecom
        if not self.url or wecom.callback or time.monotonic() < self._next:
            return
        wecom.diary.refusal = ''
        problem = wecom.bot.mode == 'json' and wecom.bot.verify(self.url) or wecom.verify(self.url)
        self._next = time.monotonic() + wecom.verify_within
        if not problem:
            tell('回调 URL %s 通过了校验' % self.url)
        elif problem != self._told:
            tell('simulator: 回调 URL 没有通过校验：' + problem, sys.stderr)
            wecom._log('log', level='WARNING', text='回调 URL 没有通过校验：' + problem)
        self._told = problem
        if wecom.process and '没有响应' not in problem:
            self.url = None             # 它自己的毛病：重新启动以前，再试也一样


class Keeper(Host):
    """启动机器人，看着它：它退出了就说最后几行；改了文件、点了「重新启动」就再启动。聊天记录和密钥都还在。"""

    def __init__(self, wecom, command, app, sections, reload):
        super().__init__(wecom)
        self._command, self._app, self._sections, self._reload = command, app, sections, reload     # reload：看着文件
        self._mark, self._asked = '\x1e%s ' % secrets.token_hex(8), threading.Event()
        self.code, self._lines, self._seen, self._now, self._look = None, (), {}, {}, 0

    def state(self):
        """聊天页要知道的：在运行还是退出了，退出码，stderr 的最后几行。"""
        return {'state': 'running' if self.code is None else 'exited', 'code': self.code, 'lines': list(self._lines),
                'program': os.path.basename(self._command[0]), 'reload': self._reload}

    def why(self):
        """为什么还没有回调 URL。"""
        return '机器人还没有通过回调 URL 的校验：等一下再发，或看启动它的终端' if self.code is None else (
            '机器人退出了：%s点「重新启动」' % ('改好它的文件，或' if self._reload else ''))

    def restart(self):
        self._asked.set()

    def run(self, stopping):
        """到被停下为止。信号只记在 stopping 里，不抛异常：没有哪个瞬间会丢下机器人不管。"""
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(self.wecom.settings, api_base=self.wecom.url, **self.wecom.bot_settings)
            write_config(os.path.join(folder, 'config.ini'), dict(self._sections, **{self._app: settings}))
            with open(os.path.join(folder, 'sitecustomize.py'), 'w', encoding='utf-8') as f:
                f.write('%stap(%r)\nimport sitecustomize  # 系统自己的\n' % (inspect.getsource(tap), self._mark))
            self._start(folder)
            try:
                while not stopping:
                    self._watch(folder)
                    self._asked.wait(0.05)
            finally:
                self._end()

    def _start(self, folder):
        self._asked.clear()
        self.code, self.url, self._told, self._seen = None, None, '', self._stamps()
        self._lines, self.wecom.diary = collections.deque(maxlen=20), Diary(self.wecom)
        self._process = subprocess.Popen([sys.executable] + self._command, env=child_environment(folder),
                                         stderr=subprocess.PIPE)
        self._reader = threading.Thread(target=self._relay, args=(self._process.stderr, self._lines), daemon=True)
        self._reader.start()
        self._tell_page()

    def _tell_page(self):
        """启动了，或退出了：回调 URL 还没有校验。"""
        self.wecom.bot.callback = ''
        self.wecom.change(callback='')

    def _relay(self, stderr, lines):
        """机器人的 stderr 照样给用户看；从里面知道它在哪里听，它的日志说了什么。"""
        mark = self._mark.encode()
        for line in stderr:
            text, found, record = line.partition(mark)
            if found:
                with contextlib.suppress(TypeError, ValueError):        # 和别的线程写的混在一起了
                    self.wecom.diary.heard(*json.loads(record.decode('utf-8', 'replace')))
            if text:
                with contextlib.suppress(BrokenPipeError):      # 没有人看，也要替它读走
                    sys.stderr.buffer.write(text)
                    sys.stderr.buffer.flush()
                lines.append(text.decode('utf-8', 'replace').rstrip())
                self.url = callback_url(text) or self.url

    def _stamps(self):
        """程序旁边的模块，和这一份 easywechat.py → {路径：（什么时候改的，大小）}。"""
        folder, found = os.path.dirname(os.path.abspath(self._command[0])), {}
        with contextlib.suppress(OSError):
            names = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.py')]
            for path in names + [inspect.getfile(WeChatError)]:
                status = os.stat(path)
                found[path] = status.st_mtime_ns, status.st_size
        return found

    def _edited(self):
        """一个改过的文件的名字，没有是 ''；还在写的，等它写完。"""
        if not self._reload or time.monotonic() < self._look:
            return ''
        before, self._now, self._look = self._now, self._stamps(), time.monotonic() + 0.3
        edited = [path for path, stamp in self._now.items() if self._seen.get(path) != stamp]
        return os.path.basename(edited[0]) if edited and self._now == before else ''

    def _watch(self, folder):
        """看一眼：退出了就说，该校验就校验，要重新启动就重新启动。"""
        if self.code is None and self._process.poll() is not None:
            self._left()
        self.introduce()
        edited = self._edited()
        if edited or self._asked.is_set():
            tell('simulator: %s重新启动机器人' % (edited and edited + ' 改了，'), sys.stderr)
            self._end()
            self._start(folder)

    def _left(self):
        """机器人自己退出了。"""
        self._reader.join(2)            # 它自己的子进程可能还拿着 stderr
        self.code, self.url = self._process.poll(), None
        asked = re.findall(r'(?:没有|config\.ini 的) \[([^\]]+)\]', '\n'.join(self._lines)) or [self._app]
        if asked[-1] != self._app:
            self._lines.append('它用的是 [{0}] 这一节：模拟器加上 --app {0}'.format(asked[-1]))
            tell('simulator: ' + self._lines[-1], sys.stderr)
        tell('simulator: 机器人退出了，退出码 %d；%s在聊天页上点「重新启动」' % (
            self.code, '改了文件会重新启动，也可以' if self._reload else ''), sys.stderr)
        self._tell_page()

    def _end(self):
        """结束机器人：先请，8 秒以后不再等。"""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(8)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(2)
        if not self._reader.is_alive():
            self._process.stderr.close()


class Listener(Host):
    """没有要启动的机器人：打印设置和收到的消息。``own``：用机器人自己的密钥，只打印网址。"""

    def run(self, stopping, app, own=''):
        """到被停下为止。"""
        wecom, shown = self.wecom, 0
        tell('[%s]\napi_base = %s' % (app, wecom.url))
        for name, value in dict(wecom.settings, **wecom.bot_settings).items():
            if name == 'bot_url' or not own:
                tell('%s = %s' % (name, value))
        wecom.bot.met.update(wecom.users)       # 要跟它说过话，才收得到：这里没有地方说，就当作都说过
        while not stopping:
            self.introduce()
            for arrived in wecom.messages, wecom.robot_messages:
                while arrived:
                    tell(json.dumps(arrived.pop(0), ensure_ascii=False))
            for bubble in wecom.bot.bubbles[shown:]:        # 智能机器人主动发的
                tell(json.dumps({k: bubble[k] for k in ('chat', 'kind', 'text')}, ensure_ascii=False))
                shown += 1
            time.sleep(min(0.2, wecom.verify_within))


def own_sections(names):
    """自己的 config.ini 里的这几节 → {名字：dict}。应用的不抄：在这里说的话会到真的人那里。"""
    sections = {name: get_section(name) for name in names}
    for name, values in sections.items():
        if not values or 'corpid' in values or 'robot' in values:
            raise ValueError('[%s] 不在 config.ini 里，或者是一个应用' % name)
    return sections


def arguments(argv):
    parser = argparse.ArgumentParser(description='本机模拟器：聊天页、回调、API。')
    parser.add_argument('--port', type=int, default=0, help='聊天页和 API 的端口（默认由系统挑）')
    parser.add_argument('--url', help='机器人已经在别处运行：它的回调 URL')
    parser.add_argument('--config', metavar='FILE', help='已经在运行的机器人的 config.ini：用它的密钥')
    parser.add_argument('--app', default='demo', help='机器人用的是 config.ini 的哪一节（默认 demo）')
    parser.add_argument('--with', dest='sections', default='', metavar='NAME,NAME',
                        help='自己的 config.ini 里哪几节也给机器人，例如 nas,llm')
    parser.add_argument('--json', action='store_true', help='智能机器人用 JSON 回调，和应用同一个回调 URL')
    parser.add_argument('--no-reload', dest='reload', action='store_false',
                        help='改了机器人的文件（它和旁边的 .py、easywechat.py）不重新启动它')
    parser.add_argument('--reload', action='store_true', default=True, help=argparse.SUPPRESS)
    parser.add_argument('bot', nargs='?', help='机器人的程序，例如 examples/demo.py')
    parser.add_argument('args', nargs=argparse.REMAINDER, help='给它的参数')
    args = parser.parse_args(argv)
    for wrong, text in ((args.bot and args.url, '--url 是机器人已经在运行，不用再启动一个'),
                        (args.bot and args.config, '--config 是机器人已经在运行，要启动的机器人得到新的密钥'),
                        (args.sections and not args.bot, '--with 是给要启动的机器人的'),
                        (args.url and not re.match('https?://[^/]', args.url),
                         '--url 要整个网址，例如 http://127.0.0.1:8000/weixin')):
        if wrong:
            parser.error(text)
    try:
        args.sections = own_sections(args.sections.split(',') if args.sections else [])
    except (WeChatError, ValueError) as e:
        parser.error('--with：%s' % e)
    return args


def main(argv=None):
    args, stopping = arguments(argv), []
    for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
        if hasattr(signal, name):           # Windows 没有 SIGHUP
            signal.signal(getattr(signal, name), lambda number, frame: stopping.append(number))
    wecom = WeCom()
    wecom.name = os.path.basename(args.bot or wecom.name)
    wecom.bot.mode = 'json' if args.json else 'ws'
    settings = get_config(args.app, args.config) if args.config else {}
    for ours in wecom.settings, wecom.bot.settings:
        ours.update((k, settings[k]) for k in ours if settings.get(k))
    try:
        wecom.start('127.0.0.1', args.port)
    except (OSError, OverflowError) as e:
        raise OSError('端口 %d 用不了，用 --port 换一个：%s' % (args.port, e)) from None
    tell('聊天页：%s 按 Ctrl-C 停止。' % wecom.page, sys.stdout if args.bot else sys.stderr)
    try:
        if args.bot:
            wecom.process = Keeper(wecom, [args.bot] + args.args, args.app, args.sections, args.reload)
            wecom.process.run(stopping)
        else:
            Listener(wecom, args.url).run(stopping, args.app, args.config)
    finally:
        wecom.stop()


if __name__ == '__main__':
    command(main)
