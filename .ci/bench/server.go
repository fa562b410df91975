// Go's net/http, hand-written for this comparison: verify, decrypt, read two nodes, answer. GOMAXPROCS comes from the environment.
package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"
)

var token, corpid = os.Getenv("EASYWECHAT_TOKEN"), os.Getenv("EASYWECHAT_CORPID")
var key, _ = base64.StdEncoding.DecodeString(os.Getenv("EASYWECHAT_ENCODING_AES_KEY") + "=")

type message struct {
	ToUserName, FromUserName, Content, Encrypt string
}

func sign(parts ...string) string {
	parts = append(parts, token)
	sort.Strings(parts)
	return fmt.Sprintf("%x", sha1.Sum([]byte(strings.Join(parts, ""))))
}

func open(encrypt string) ([]byte, bool) {
	data, err := base64.StdEncoding.DecodeString(encrypt)
	if err != nil || len(data) < 32 || len(data)%16 != 0 {
		return nil, false
	}
	block, _ := aes.NewCipher(key)
	cipher.NewCBCDecrypter(block, key[:16]).CryptBlocks(data, data)
	pad := int(data[len(data)-1])
	if pad < 1 || pad > 32 {
		return nil, false
	}
	data = data[:len(data)-pad]
	end := 20 + int(binary.BigEndian.Uint32(data[16:20]))
	if end > len(data) || string(data[end:]) != corpid {
		return nil, false
	}
	return data[20:end], true
}

func seal(text string) string {
	var data bytes.Buffer
	io.CopyN(&data, rand.Reader, 16)
	binary.Write(&data, binary.BigEndian, uint32(len(text)))
	data.WriteString(text + corpid)
	pad := 32 - data.Len()%32
	data.Write(bytes.Repeat([]byte{byte(pad)}, pad))
	block, _ := aes.NewCipher(key)
	cipher.NewCBCEncrypter(block, key[:16]).CryptBlocks(data.Bytes(), data.Bytes())
	return base64.StdEncoding.EncodeToString(data.Bytes())
}

func handle(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	var envelope, msg message
	if err != nil || xml.Unmarshal(body, &envelope) != nil {
		w.WriteHeader(400)
		return
	}
	expected := sign(query.Get("timestamp"), query.Get("nonce"), envelope.Encrypt)
	if subtle.ConstantTimeCompare([]byte(expected), []byte(query.Get("msg_signature"))) != 1 {
		w.WriteHeader(403)
		return
	}
	text, ok := open(envelope.Encrypt)
	if !ok || xml.Unmarshal(text, &msg) != nil {
		w.WriteHeader(403)
		return
	}
	now := strconv.FormatInt(time.Now().Unix(), 10)
	encrypt := seal("<xml><ToUserName><![CDATA[" + msg.FromUserName + "]]></ToUserName><FromUserName><![CDATA[" + msg.ToUserName +
		"]]></FromUserName><CreateTime>" + now + "</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[" +
		strings.ReplaceAll(msg.Content, "]]>", "]]]]><![CDATA[>") + "]]></Content></xml>")
	answer := "<xml><Encrypt><![CDATA[" + encrypt + "]]></Encrypt><MsgSignature><![CDATA[" + sign(now, query.Get("nonce"), encrypt) +
		"]]></MsgSignature><TimeStamp>" + now + "</TimeStamp><Nonce><![CDATA[" + query.Get("nonce") + "]]></Nonce></xml>"
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	io.WriteString(w, answer)
}

func main() {
	http.HandleFunc("/weixin", handle)
	http.ListenAndServe("127.0.0.1:"+os.Args[1], nil)
}
