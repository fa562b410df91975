"""The codec alone: verify, open, parse, build, seal, sign; ours and wechatpy's in turn; prints microseconds of each."""
import statistics
import sys
import time

sys.path.insert(0, sys.argv[1])

import easywechat  # noqa: E402
from wechatpy.work import create_reply, parse_message  # noqa: E402
from wechatpy.work.crypto import WeChatCrypto  # noqa: E402

TOKEN, KEY, CORPID = 'token', 'k' * 43, 'ww0123456789abcdef'
OURS = easywechat.WXBizMsgCrypt(TOKEN, KEY, CORPID)
THEIRS = WeChatCrypto(TOKEN, KEY, CORPID)
XML = easywechat.dict_to_xml({
    'ToUserName': CORPID, 'FromUserName': 'zhangsan', 'CreateTime': 1700000000, 'MsgType': 'text',
    'Content': '磁盘快满了,请看一看是不是日志太多。' * 3, 'MsgId': 7300000000000000001, 'AgentID': 1000002})
NOW = str(int(time.time()))
ENCRYPT = OURS.seal(XML)
SIGNATURE = OURS.sign(NOW, '1372623149', ENCRYPT)
BODY = b'<xml><ToUserName><![CDATA[ww]]></ToUserName><Encrypt><![CDATA[%s]]></Encrypt></xml>' % ENCRYPT


def ours():
    msg = easywechat.xml_to_dict(OURS.decrypt_message(BODY, SIGNATURE, NOW, '1372623149'))
    message, = easywechat._made(msg, 'text')
    reply = easywechat._passive(message, msg['FromUserName'], msg['ToUserName'], 1700000000)
    return OURS.encrypt_message(reply, '1372623149')


def theirs():
    msg = parse_message(THEIRS.decrypt_message(BODY, SIGNATURE, NOW, '1372623149'))
    return THEIRS.encrypt_message(create_reply(msg.content, msg).render(), '1372623149', NOW)


def once(function, count=1000):
    begin = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - begin) / count * 1e6


figures = [(once(ours), once(theirs)) for _ in range(9)]
print(*(statistics.median(column) for column in zip(*figures)))
