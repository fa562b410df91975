#!/usr/bin/env python3
"""两种回调:一个函数,和一个记得住事情的对象的方法。

先 `python easywechat.py --init` 写出 config.ini,填好 corpid,然后 `python examples/demo.py`;
另一个终端里 `python easywechat.py --probe '你好'`。
"""

import argparse
import os
import sys

# 在自己的项目里,easywechat.py 就放在程序旁边,不需要这一行。
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import easywechat  # noqa: E402


def reply_func(param_dict):
    """图片、语音、视频原样送回去。"""
    return param_dict


class Counter:
    """数每个人说过几句话。"""

    def __init__(self):
        self.counts = {}

    def reply(self, param_dict):
        """文本:回同一句话,加上这是第几句。"""
        user = param_dict['FromUserName']
        self.counts[user] = self.counts.get(user, 0) + 1
        return '%s(第 %d 句)' % (param_dict['Content'], self.counts[user])


def main(argv=None):
    parser = argparse.ArgumentParser(description='回同一句话,数第几句;图片、语音、视频原样送回去。')
    parser.add_argument('--port', type=int, default=8000, help='端口(默认 8000)')
    port = parser.parse_args(argv).port
    try:
        server = easywechat.WeChatServer('demo')
        server.register_callback('text', Counter().reply)
        for msg_type in ('image', 'voice', 'video'):
            server.register_callback(msg_type, reply_func)
        server.run(host='0.0.0.0', port=port, debug=False)
        return 0
    except (easywechat.WeChatError, ImportError, OverflowError) as e:
        code, text = 2, getattr(e, 'errmsg', e)
    except OSError as e:
        code, text = 3, 'cannot listen on 0.0.0.0 port %d: %s; --port takes another' % (
            port, e.strerror)
    print('demo: %s' % text, file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.exit(main())
