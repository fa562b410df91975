// Node's http with Tencent's @wecom/crypto and a hand-made reading of two XML nodes.
const http = require('http');
const { getSignature, decrypt, encrypt } = require('@wecom/crypto');
const env = (k) => process.env['EASYWECHAT_' + k];
const TOKEN = env('TOKEN'), KEY = env('ENCODING_AES_KEY'), CORPID = env('CORPID');
const node = (xml, name) => (xml.match(new RegExp(`<${name}><!\\[CDATA\\[([^]*?)\\]\\]></${name}>`)) || [])[1];

http.createServer((req, res) => {
  const query = new URL(req.url, 'http://x').searchParams;
  const parts = [];
  req.on('data', (d) => parts.push(d));
  req.on('end', () => {
    const cipher = node(Buffer.concat(parts).toString(), 'Encrypt');
    const nonce = query.get('nonce');
    if (getSignature(TOKEN, query.get('timestamp'), nonce, cipher) !== query.get('msg_signature')) {
      res.writeHead(403).end();
      return;
    }
    const xml = decrypt(KEY, cipher).message;
    const now = String(Math.floor(Date.now() / 1000));
    const reply = encrypt(KEY, `<xml><ToUserName><![CDATA[${node(xml, 'FromUserName')}]]></ToUserName><FromUserName><![CDATA[${
      node(xml, 'ToUserName')}]]></FromUserName><CreateTime>${now}</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[${
      node(xml, 'Content')}]]></Content></xml>`, CORPID);
    const body = `<xml><Encrypt><![CDATA[${reply}]]></Encrypt><MsgSignature><![CDATA[${
      getSignature(TOKEN, now, nonce, reply)}]]></MsgSignature><TimeStamp>${now}</TimeStamp><Nonce><![CDATA[${nonce}]]></Nonce></xml>`;
    res.writeHead(200, { 'Content-Type': 'text/xml', 'Content-Length': Buffer.byteLength(body) }).end(body);
  });
}).listen(Number(process.argv[2]), '127.0.0.1');
