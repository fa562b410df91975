#!/usr/bin/env python3
"""第一个机器人：回同一句话，数着是第几句；说「菜单」「按钮」「文件」，发图片、位置，也有回答。

    python examples/simulator.py examples/demo.py       # 没有账号，在本机的聊天页里试
    python examples/demo.py --port 8001                 # 用自己的 config.ini；不写就是 8000 端口
"""
import argparse
import os
import pathlib
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))     # 自己的项目里不用这一行

import easywechat  # noqa: E402


def reply_func(param_dict):
    """图片、语音、视频、文件：原样返回，就是发回去。"""
    return param_dict


class Counter:
    """一个记得住事情的对象：每个人说过几句话。"""

    def __init__(self):
        self.counts = {}

    def reply(self, msg):
        """文字：回同一句话，加上这是第几句。"""
        user = msg['FromUserName']
        self.counts[user] = self.counts.get(user, 0) + 1
        return '%s（第 %d 句）' % (msg['Content'], self.counts[user])


def card(title, task_id):
    """有两个按钮的卡片；每张的 task_id 都不同。"""
    return {'card_type': 'button_interaction', 'main_title': {'title': title}, 'task_id': task_id,
            'button_list': [{'text': food, 'key': food} for food in ('米饭', '面条')]}


def register(server):
    """什么消息，由谁来答。"""
    def menu(msg):
        if 'aibotid' in msg:
            return '智能机器人没有菜单，说「按钮」试试'
        server.client.call('menu/create', {'button': [
            {'type': 'click', 'name': name, 'key': name} for name in ('吃什么', '去哪里')]},
            agentid=server.settings['agentid'])
        return '菜单建好了，点一下试试'

    on = server.register_callback
    on('text', Counter().reply)
    on('text', menu, pattern='菜单')
    on('text', lambda msg: pathlib.Path(__file__), pattern='文件')
    on('text', lambda msg: {'msgtype': 'template_card', 'template_card': card('今天吃什么？', os.urandom(8).hex())},
       pattern='按钮')
    on('event:template_card_event', lambda msg: {
        'response_type': 'update_template_card',
        'template_card': dict(card('今天吃' + msg['EventKey'], msg['TaskId']), replace_text='选好了')})
    on('event:click', lambda msg: '你点了菜单里的「%s」' % msg['EventKey'])
    on('location', lambda msg: '你在%s（%s，%s）' % (msg['Label'], msg['Location_X'], msg['Location_Y']))
    for msg_type in 'image', 'voice', 'video', 'file':
        on(msg_type, reply_func)


def main(argv=None):
    parser = argparse.ArgumentParser(description='第一个机器人：回同一句话，还有菜单、按钮、文件。')
    parser.add_argument('--port', type=int, default=8000, help='端口（默认 8000）')
    port = parser.parse_args(argv).port
    server = easywechat.WeChatServer('demo')
    register(server)
    server.run(host='0.0.0.0', port=port, debug=True)       # debug：出错的那一行也回给用户，正式用的时候去掉


if __name__ == '__main__':
    easywechat.command(main)
